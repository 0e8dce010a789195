"""Stream codecs: how an annotation becomes an image, and how it is read back from one.

A model only ever sees and writes images, so what a stream means is decided here and nowhere else. A codec is
a small frozen value with `draw` and `parse`; it is stored as JSON in the manifest of the scenes it drew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import scipy.ndimage

from lvm.errors import UserError


class Codec(Protocol):
    """What every stream codec does. `parse` also reads images that are not exact, as a model's are."""

    @property
    def kind(self) -> str:
        """The name of the codec's class in JSON."""

    def draw(self, *annotation: Any, **options: Any) -> np.ndarray:
        """The annotation as an image, uint8 [H, W, 3]."""

    def parse(self, image: np.ndarray) -> Any:
        """The annotation in an image, uint8 [H, W, 3]."""

    def to_json(self) -> dict[str, Any]:
        """The kind and the fields, as `codec_from_json` reads them."""


class _Json:
    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The kind and the fields, as `codec_from_json` reads them."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"kind": self.kind} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def _farthest_points(count: int, levels: int) -> np.ndarray:
    """`count` colours, uint8 [count, 3]: black, then always the lattice point farthest from those taken."""
    axis = np.linspace(0, 255, levels).round().astype(np.int64)
    lattice = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    chosen = [0]
    distance = np.full(len(lattice), np.iinfo(np.int64).max)
    while len(chosen) < count:
        distance = np.minimum(distance, ((lattice - lattice[chosen[-1]]) ** 2).sum(-1))
        chosen.append(int(distance.argmax()))
    return lattice[chosen].astype(np.uint8)


PALETTE = _farthest_points(256, levels=9)  # [256, 3]; part of what stored scenes mean: never change it
PALETTE.flags.writeable = False


def nearest_colours(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """For each pixel of an image [H, W, 3] the row of the nearest of the colours [K, 3], int [H, W].

    Distance is squared RGB distance; between equals the lower row wins.
    """
    pixels, palette = image.reshape(-1, 3).astype(np.float32), colours.astype(np.float32)
    # |pixel|² is the same for all colours. All terms are whole and below 2²⁴: exact in float32.
    distance = (palette**2).sum(-1) - 2 * (pixels @ palette.T)  # [H·W, K]
    return distance.argmin(-1).reshape(image.shape[:2])


@dataclasses.dataclass(frozen=True)
class Image(_Json):
    """Photographs, drawn poses and whatever else is an image already: nothing to draw, nothing to read."""

    kind: ClassVar[str] = "image"

    def draw(self, image: np.ndarray) -> np.ndarray:
        """The image itself, uint8 [H, W, 3]."""
        return _check_image(image, "image")

    def parse(self, image: np.ndarray) -> np.ndarray:
        """The image itself, uint8 [H, W, 3]."""
        return _check_image(image, "image")


@dataclasses.dataclass(frozen=True)
class Palette(_Json):
    """Class ids as colours: id i has the colour `PALETTE[i]`.

    Attributes:
      names: the classes, by id; "" for an id that no class has (it can't be drawn and is never read).
      background: the id that means "none of the classes", or None.
      ignore: the id that means "nobody knows", or None; scores leave it out.
    """

    kind: ClassVar[str] = "palette"
    names: tuple[str, ...]
    background: int | None = None
    ignore: int | None = None

    def __post_init__(self) -> None:
        _check_names(self.kind, self.names, limit=len(PALETTE))
        for field in ("background", "ignore"):
            value = getattr(self, field)
            if value is not None and not (_is_int(value) and 0 <= value < len(self.names)):
                raise UserError(
                    f"palette.{field} is {value!r}; expected a class id in [0, {len(self.names)}) or none"
                )

    def draw(self, ids: np.ndarray) -> np.ndarray:
        """Integer class ids [H, W] as colours, uint8 [H, W, 3]. Raises UserError for an id without a name."""
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"class ids are {ids.dtype} {list(ids.shape)}; expected integers [H, W]")
        named = np.array([bool(name) for name in self.names])
        inside = ids.size == 0 or (ids.min() >= 0 and ids.max() < len(named))
        if not (inside and named[ids].all()):
            unnamed = sorted(set(np.unique(ids).tolist()) - set(self.used_ids.tolist()))
            raise UserError(f"class ids {unnamed[:8]} have no name; {self._valid()}")
        return PALETTE[ids]  # [H, W, 3]

    def parse(self, image: np.ndarray) -> np.ndarray:
        """Class ids, uint8 [H, W]: the class whose colour is nearest by squared RGB distance."""
        used = self.used_ids
        return used[nearest_colours(_check_image(image, self.kind), PALETTE[used])]  # [H, W]

    @property
    def used_ids(self) -> np.ndarray:
        """The ids that have a name, ascending, uint8 [K]."""
        return np.array([i for i, name in enumerate(self.names) if name], np.uint8)

    def _valid(self) -> str:
        last = int(self.used_ids[-1])
        gaps = last + 1 - len(self.used_ids)
        return f"the {len(self.used_ids)} named ids lie in [0, {last}]" + (
            f" with {gaps} gaps" if gaps else ""
        )


@dataclasses.dataclass(frozen=True)
class Depth(_Json):
    """Depth as grey: level 255 is `near` (bright), level 1 is `far`, linear between and clipped beyond.

    Level 0 is "no reading", as 0 is in the annotation. A depth inside [near, far] is read back to within half
    a level, (far − near) / 508.

    Attributes:
      near, far: the range that is drawn, in `unit`s; 0 <= near < far.
      unit: the name of the unit, such as "mm".
    """

    kind: ClassVar[str] = "depth"
    near: float
    far: float
    unit: str

    def __post_init__(self) -> None:
        ordered = _is_number(self.near) and _is_number(self.far) and 0 <= self.near < self.far < np.inf
        if not ordered:
            raise UserError(f"depth has near {self.near!r} and far {self.far!r}; expected 0 <= near < far")
        if not isinstance(self.unit, str):
            raise UserError(f"depth.unit is {self.unit!r}; expected a name such as 'mm'")

    def draw(self, depth: np.ndarray) -> np.ndarray:
        """Depth [H, W] in `unit`s, 0 for no reading, as grey, uint8 [H, W, 3].

        Raises UserError for NaN and negative values.
        """
        depth = _check_map(depth, self.kind).astype(np.float32)
        if depth.size and not depth.min() >= 0:
            raise UserError("depth holds NaN or negative values; expected 0 for no reading, or more")
        level = 255 - (depth - self.near) * (254 / (self.far - self.near))
        level = np.where(depth > 0, np.clip(np.rint(level), 1, 255), 0)
        return _grey(level)  # [H, W, 3]

    def parse(self, image: np.ndarray) -> np.ndarray:
        """Depth in `unit`s, float32 [H, W]; 0 where there is no reading (grey level below 0.5)."""
        level = _level(image, self.kind)
        step = (self.far - self.near) / 254
        # With near = 0 the brightest level would read as "no reading": take the middle of what it stands for.
        depth = np.maximum(self.near + (255 - np.maximum(level, 1)) * step, step / 4)
        return np.where(level < 0.5, 0, depth).astype(np.float32)  # [H, W]


@dataclasses.dataclass(frozen=True)
class Edges(_Json):
    """Edge strength in [0, 1] as white on black; read back to within half a level, 1/510."""

    kind: ClassVar[str] = "edges"

    def draw(self, strength: np.ndarray) -> np.ndarray:
        """Edge strength [H, W] in [0, 1] as grey, uint8 [H, W, 3]. Raises UserError for other values."""
        strength = _check_map(strength, self.kind)
        if strength.size and not (strength.min() >= 0 and strength.max() <= 1):
            raise UserError(
                f"edge strength lies in [{strength.min()}, {strength.max()}]; expected values in [0, 1]"
            )
        return _grey(np.rint(strength * 255))  # [H, W, 3]

    def parse(self, image: np.ndarray) -> np.ndarray:
        """Edge strength in [0, 1], float32 [H, W]."""
        return _level(image, self.kind) / 255  # [H, W]


@dataclasses.dataclass(frozen=True)
class Normals(_Json):
    """Unit vectors (x right, y down, z to the viewer) as colours (n + 1) / 2; read back to within 0.01."""

    kind: ClassVar[str] = "normals"

    def draw(self, normals: np.ndarray) -> np.ndarray:
        """Unit vectors [H, W, 3] as colours, uint8 [H, W, 3]. Raises UserError for another length than 1."""
        if normals.ndim != 3 or normals.shape[2] != 3:
            raise UserError(f"normals have shape {list(normals.shape)}; expected [H, W, 3]")
        length = np.linalg.norm(normals, axis=-1)
        if not np.all(np.abs(length - 1) < 1e-3):
            raise UserError("normals are not of length 1; normalize them first")
        return np.rint((normals + 1) * 127.5).clip(0, 255).astype(np.uint8)  # [H, W, 3]

    def parse(self, image: np.ndarray) -> np.ndarray:
        """Unit vectors, float32 [H, W, 3]."""
        vectors = _check_image(image, self.kind).astype(np.float32) / 127.5 - 1
        # No 8-bit colour is exactly zero (127.5), so the length never is.
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)  # [H, W, 3]

    def flip(self, normals: np.ndarray) -> np.ndarray:
        """The normals [H, W, 3] of the mirrored scene: columns reversed and x negated."""
        return normals[:, ::-1] * np.array([-1, 1, 1], normals.dtype)


class Box(NamedTuple):
    """A box of class `class_id` over the pixels [x0, x1) × [y0, y1)."""

    class_id: int
    x0: int
    y0: int
    x1: int
    y1: int


@dataclasses.dataclass(frozen=True)
class Boxes(_Json):
    """Boxes as filled rectangles on black, one colour a class: class i has the colour `PALETTE[i + 1]`.

    Boxes that do not overlap, nor touch another of their class, are read back exactly.

    Attributes:
      names: the classes, by id.
    """

    kind: ClassVar[str] = "boxes"
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_names(self.kind, self.names, limit=len(PALETTE) - 1)

    def draw(self, boxes: Sequence[Box], size: tuple[int, int]) -> np.ndarray:
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
        ids = nearest_colours(_check_image(image, self.kind), PALETTE[: len(self.names) + 1])  # [H, W]
        boxes = []
        for class_id in range(len(self.names)):
            regions, _ = scipy.ndimage.label(ids == class_id + 1)
            for rows, columns in scipy.ndimage.find_objects(regions):
                boxes.append(Box(class_id, columns.start, rows.start, columns.stop, rows.stop))
        return boxes


CODECS: dict[str, type] = {codec.kind: codec for codec in (Image, Palette, Depth, Edges, Normals, Boxes)}


def codec_from_json(fields: Mapping[str, Any]) -> Codec:
    """The codec that `to_json` wrote. Raises UserError for an unknown kind and unknown or missing fields."""
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in CODECS:
        raise UserError(f"a stream codec has the kind {kind!r}; expected one of {', '.join(CODECS)}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "kind"}
    known = {field.name: field for field in dataclasses.fields(CODECS[kind])}
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    if not required <= set(given) <= set(known):
        raise UserError(f"a stream codec of kind {kind!r} has {sorted(given)}; expected {list(known)}")
    return CODECS[kind](**given)


def _check_names(kind: str, names: Any, limit: int) -> None:
    texts = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
    if not texts or not any(names) or len(names) > limit:
        raise UserError(f"{kind}.names is {str(names)[:80]}; expected 1 to {limit} class names")


def _check_image(image: np.ndarray, kind: str) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(
            f"the image of a stream of kind {kind!r} is {image.dtype} {list(image.shape)}; "
            "expected uint8 [H, W, 3]"
        )
    return image


def _check_map(values: np.ndarray, kind: str) -> np.ndarray:
    if values.ndim != 2:
        raise UserError(f"{kind} has shape {list(values.shape)}; expected [H, W]")
    return values


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _grey(level: np.ndarray) -> np.ndarray:
    return np.repeat(level.astype(np.uint8)[..., None], 3, axis=-1)  # [H, W, 3]


def _level(image: np.ndarray, kind: str) -> np.ndarray:
    """The grey level of an image as float32 [H, W], in [0, 255]: the mean of the channels."""
    return _check_image(image, kind).mean(-1, dtype=np.float32)  # [H, W]
