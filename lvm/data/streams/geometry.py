"""Stream codecs of boxes and skeletons, rendered at the resolution of the image and never resized."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Float64, UInt8

from lvm.common.errors import UserError
from lvm.data.streams.base import PALETTE, Codec, check_image, check_names, nearest_colors


class Box(NamedTuple):
    """A box of class `class_id` over the pixels [x0, x1) × [y0, y1)."""

    class_id: int
    x0: int
    y0: int
    x1: int
    y1: int


@dataclasses.dataclass(frozen=True)
class Boxes(Codec):
    """Boxes as filled rectangles on black: class i has the color `PALETTE[i + 1]`.

    Boxes that don't overlap, nor touch another of their class, are parsed exactly.

    Attributes:
      names: the classes, by id.
    """

    kind: ClassVar[str] = "boxes"
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        check_names("boxes.names", self.names, limit=len(PALETTE) - 1)

    def render(self, boxes: Sequence[Box], size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
        """Renders boxes in order, later ones over earlier ones, in an image of `size` (H, W).

        Raises UserError for a box that is empty, outside the image, or of an unknown class.
        """
        height, width = size
        ids = np.zeros(size, np.uint8)
        for box in boxes:
            if not 0 <= box.class_id < len(self.names):
                raise UserError(f"{box} has an unknown class; expected an id in [0, {len(self.names)})")
            if not (0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height):
                raise UserError(f"{box} is empty or outside the image of {width}×{height}")
            ids[box.y0 : box.y1, box.x0 : box.x1] = box.class_id + 1
        return PALETTE[ids]

    def parse(self, image: np.ndarray) -> list[Box]:
        """Parses the bounding box of each connected region of a class color, ordered by class, then by row."""
        ids = nearest_colors(check_image(image, self.kind), PALETTE[: len(self.names) + 1])  # [H, W]
        boxes = []
        for class_id in range(len(self.names)):
            regions, _ = scipy.ndimage.label(ids == class_id + 1)
            for rows, columns in scipy.ndimage.find_objects(regions):
                boxes.append(Box(class_id, columns.start, rows.start, columns.stop, rows.stop))
        return boxes


@dataclasses.dataclass(frozen=True)
class Pose(Codec):
    """Skeletons on black: limbs as white lines, and over them joint i as a disc of the color `PALETTE[i + 2]`.

    A joint is parsed to within half a pixel in x and y if its disc is inside the image, touches no disc of the same
    joint, and isn't covered. The assignment of joints to people is lost.

    Attributes:
      joints: their names; "left …" and "right …" with the same remainder are swapped by mirroring.
      limbs: joint indices, two for each line.
      radius: of the discs, in pixels.
    """

    kind: ClassVar[str] = "pose"
    joints: tuple[str, ...]
    limbs: tuple[int, ...] = ()
    radius: int = 3

    def __post_init__(self) -> None:
        check_names("pose.joints", self.joints, limit=len(PALETTE) - 2)
        valid = [type(i) is int and 0 <= i < len(self.joints) for i in self.limbs]
        if len(self.limbs) % 2 or not all(valid):
            raise UserError(f"pose.limbs={self.limbs!r} must be pairs of joints in [0, {len(self.joints)})")
        if type(self.radius) is not int or self.radius < 1:
            raise UserError(f"pose.radius={self.radius!r} must be 1 pixel or more")

    def render(self, people: np.ndarray, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
        """Renders skeletons in an image of `size` (H, W). Raises UserError for another shape.

        `people` are joints (x, y), float [P, J, 2], as of `Preprocess.map_points`; NaN marks an unseen joint.
        """
        if people.ndim != 3 or people.shape[1:] != (len(self.joints), 2):
            raise UserError(f"people have shape {list(people.shape)}; expected [P, {len(self.joints)}, 2]")
        ids = np.zeros(size, np.uint8)
        visible = ~np.isnan(people).any(-1)  # [P, J]
        for person, is_visible in zip(people, visible, strict=True):
            for a, b in zip(self.limbs[::2], self.limbs[1::2], strict=True):
                if is_visible[a] and is_visible[b]:
                    steps = int(np.abs(person[a] - person[b]).max()) + 2
                    _fill(ids, np.linspace(person[a], person[b], steps), 0, 1)
        for person, is_visible in zip(people, visible, strict=True):
            for joint in np.flatnonzero(is_visible):
                _fill(ids, person[joint : joint + 1], self.radius, int(joint) + 2)
        return PALETTE[ids]

    def parse(self, image: np.ndarray) -> list[Float64[np.ndarray, "_ 2"]]:
        """Parses for each joint the centers (x, y) of its discs, by row."""
        ids = nearest_colors(check_image(image, self.kind), PALETTE[: len(self.joints) + 2])  # [H, W]
        joints = []
        for joint in range(len(self.joints)):
            regions, count = scipy.ndimage.label(ids == joint + 2)
            centers = scipy.ndimage.center_of_mass(regions > 0, regions, range(1, count + 1))  # (row, column)
            joints.append(np.array(centers, np.float64).reshape(-1, 2)[:, ::-1] + 0.5)
        return joints

    def mirror(self, image: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
        """Mirrors the image and swaps the colors of left and right joints."""
        ids = nearest_colors(check_image(image, self.kind), PALETTE[: len(self.joints) + 2])
        swapped = np.array([0, 1, *(joint + 2 for joint in self.mirrored_joints())])
        return PALETTE[swapped[ids]][:, ::-1]

    def mirrored_joints(self) -> list[int]:
        """For each joint the index of its counterpart on the other side of the body, or its own."""
        sides = {"left": "right", "right": "left"}
        others = [" ".join(sides.get(word, word) for word in name.split()) for name in self.joints]
        return [self.joints.index(o) if o in self.joints else i for i, o in enumerate(others)]


def _fill(ids: np.ndarray, points: np.ndarray, radius: int, value: int) -> None:
    """Sets the pixels of `ids` [H, W] within `radius` of the pixels of points (x, y), [n, 2]."""
    offsets = np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1).T  # [k, (row, column)]
    offsets = offsets[(offsets**2).sum(-1) <= radius**2]
    centers = np.floor(points[:, ::-1]).astype(np.int64)
    rows, columns = (centers[:, None] + offsets).reshape(-1, 2).T
    inside = (rows >= 0) & (rows < ids.shape[0]) & (columns >= 0) & (columns < ids.shape[1])
    ids[rows[inside], columns[inside]] = value
