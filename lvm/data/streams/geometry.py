"""Codecs of what is drawn into an empty image, boxes and skeletons: at the size of the image, never resized."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import scipy.ndimage

from lvm.common.errors import UserError
from lvm.data.streams.base import PALETTE, BaseCodec, check_image, check_names, nearest_colors


class Box(NamedTuple):
    """A box of class `class_id` over the pixels [x0, x1) × [y0, y1)."""

    class_id: int
    x0: int
    y0: int
    x1: int
    y1: int


@dataclasses.dataclass(frozen=True)
class Boxes(BaseCodec):
    """Boxes as filled rectangles on black, one colour a class: class i has the colour `PALETTE[i + 1]`.

    Boxes that do not overlap, nor touch another of their class, are read back exactly.

    Attributes:
      names: the classes, by id.
    """

    kind: ClassVar[str] = "boxes"
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        check_names(self.kind, self.names, limit=len(PALETTE) - 1)

    def render(self, boxes: Sequence[Box], size: tuple[int, int]) -> np.ndarray:
        """The boxes painted in order (later ones cover earlier ones), uint8 [H, W, 3]; `size` is (H, W).

        Raises UserError for a box that is empty, outside of the image, or of an unknown class.
        """
        height, width = size
        ids = np.zeros(size, np.uint8)
        for box in boxes:
            if not 0 <= box.class_id < len(self.names):
                raise UserError(f"{box} is of an unknown class; expected an id in [0, {len(self.names)})")
            if not (0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height):
                raise UserError(f"{box} is empty or outside of the image of {width}×{height}")
            ids[box.y0 : box.y1, box.x0 : box.x1] = box.class_id + 1
        return PALETTE[ids]  # [H, W, 3]

    def parse(self, image: np.ndarray) -> list[Box]:
        """The bounding box of each connected region of one class colour, ordered by class, then by row."""
        ids = nearest_colors(check_image(image, self.kind), PALETTE[: len(self.names) + 1])  # [H, W]
        boxes = []
        for class_id in range(len(self.names)):
            regions, _ = scipy.ndimage.label(ids == class_id + 1)
            for rows, columns in scipy.ndimage.find_objects(regions):
                boxes.append(Box(class_id, columns.start, rows.start, columns.stop, rows.stop))
        return boxes

    @staticmethod
    def flip(boxes: Sequence[Box], width: int) -> list[Box]:
        """The boxes of the mirrored scene."""
        return [box._replace(x0=width - box.x1, x1=width - box.x0) for box in boxes]


@dataclasses.dataclass(frozen=True)
class Pose(BaseCodec):
    """Skeletons on black: limbs as white lines and over them each joint as a disc, joint i in `PALETTE[i + 2]`.

    Joints are read back to within half a pixel in x and y where their discs lie inside of the image and touch no
    other disc of their kind, nor are covered by one. Which joints are of one person is not read back.

    Attributes:
      joints: their names; "left …" and "right …" of the same rest change places in a mirror.
      limbs: numbers of joints, two for each line.
      radius: of the discs, in pixels.
    """

    kind: ClassVar[str] = "pose"
    joints: tuple[str, ...]
    limbs: tuple[int, ...] = ()
    radius: int = 3

    def __post_init__(self) -> None:
        check_names(self.kind, self.joints, limit=len(PALETTE) - 2)
        numbers = [n for n in self.limbs if type(n) is int and 0 <= n < len(self.joints)]
        if len(self.limbs) % 2 or len(numbers) < len(self.limbs):
            raise UserError(
                f"pose.limbs is {self.limbs!r}; expected pairs of joints in [0, {len(self.joints)})"
            )
        if type(self.radius) is not int or self.radius < 1:
            raise UserError(f"pose.radius is {self.radius!r}; expected pixels, 1 or more")

    def render(self, people: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Skeletons as an image, uint8 [H, W, 3].

        Args:
          people: places (x, y) of the joints, float [P, J, 2], as `Preprocess.points` gives them; NaN: not seen.
          size: (H, W) of the image.

        Raises:
          UserError: for another shape.
        """
        if people.ndim != 3 or people.shape[1:] != (len(self.joints), 2):
            raise UserError(f"people have shape {list(people.shape)}; expected [P, {len(self.joints)}, 2]")
        ids = np.zeros(size, np.uint8)
        seen = ~np.isnan(people).any(-1)  # [P, J]
        for person, visible in zip(people, seen, strict=True):
            for a, b in zip(self.limbs[::2], self.limbs[1::2], strict=True):
                if visible[a] and visible[b]:
                    steps = int(np.abs(person[a] - person[b]).max()) + 2
                    _fill(ids, np.linspace(person[a], person[b], steps), 0, 1)
        for person, visible in zip(people, seen, strict=True):
            for joint in np.flatnonzero(visible):
                _fill(ids, person[joint : joint + 1], self.radius, int(joint) + 2)
        return PALETTE[ids]  # [H, W, 3]

    def parse(self, image: np.ndarray) -> list[np.ndarray]:
        """For each joint the places (x, y) of its discs, float [n, 2], by row."""
        ids = nearest_colors(check_image(image, self.kind), PALETTE[: len(self.joints) + 2])  # [H, W]
        found = []
        for joint in range(len(self.joints)):
            regions, count = scipy.ndimage.label(ids == joint + 2)
            centres = scipy.ndimage.center_of_mass(regions > 0, regions, range(1, count + 1))
            found.append(
                np.array(centres, np.float64).reshape(-1, 2)[:, ::-1] + 0.5
            )  # (row, column) → (x, y)
        return found

    def mirror(self, image: np.ndarray) -> np.ndarray:
        """See `Codec.mirror`: the colours of left and right joints change places too."""
        ids = nearest_colors(check_image(image, self.kind), PALETTE[: len(self.joints) + 2])
        swapped = np.array([0, 1, *(joint + 2 for joint in self._mirrored())])
        return PALETTE[swapped[ids]][:, ::-1]

    def flip(self, people: np.ndarray, width: int) -> np.ndarray:
        """The joints [P, J, 2] of the mirrored scene."""
        return np.stack([width - people[..., 0], people[..., 1]], -1)[:, self._mirrored()]

    def _mirrored(self) -> list[int]:
        """Of each joint the one on the other side, or itself."""
        sides = {"left": "right", "right": "left"}
        others = [" ".join(sides.get(word, word) for word in name.split()) for name in self.joints]
        return [self.joints.index(o) if o in self.joints else i for i, o in enumerate(others)]


def _fill(ids: np.ndarray, points: np.ndarray, radius: int, value: int) -> None:
    """Sets the pixels of `ids` [H, W] within `radius` of those that points (x, y), [n, 2], lie in."""
    offsets = np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1).T  # [k, (row, column)]
    offsets = offsets[(offsets**2).sum(-1) <= radius**2]
    centres = np.floor(points[:, ::-1]).astype(np.int64)
    rows, columns = (centres[:, None] + offsets).reshape(-1, 2).T
    inside = (rows >= 0) & (rows < ids.shape[0]) & (columns >= 0) & (columns < ids.shape[1])
    ids[rows[inside], columns[inside]] = value
