"""Stream codecs of dense annotations, and the registry of all codecs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, UInt8

from lvm.common.errors import UserError
from lvm.data.streams.base import PALETTE, Codec, check_image, check_names, nearest_colors
from lvm.data.streams.geometry import Box, Boxes, Pose

__all__ = [
    "CODECS", "PALETTE", "Box", "Boxes", "Codec", "Depth", "Edges", "Image", "Normals", "Palette", "Pose",
    "codec_from_json", "nearest_colors",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Image(Codec):
    """The identity codec, for photographs and annotations that are images already."""

    kind: ClassVar[str] = "image"

    def render(self, image: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the image."""
        return check_image(image, self.kind)

    parse = render


@dataclasses.dataclass(frozen=True)
class Palette(Codec):
    """Class ids as colors: id i has the color `PALETTE[i]`.

    Attributes:
      names: the classes, by id; "" marks an unused id, which is an error to render and is never parsed.
      background: the id of "none of the classes", or None.
      ignore: the void (ignore) label, which metrics leave out, or None.
    """

    kind: ClassVar[str] = "palette"
    names: tuple[str, ...]
    background: int | None = None
    ignore: int | None = None

    def __post_init__(self) -> None:
        check_names("palette.names", self.names, limit=len(PALETTE))
        for field in ("background", "ignore"):
            value = getattr(self, field)
            if value is not None and not (type(value) is int and 0 <= value < len(self.names)):
                raise UserError(f"palette.{field}={value!r} must be a class id in [0, {len(self.names)}) or None")

    def render(self, ids: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
        """Renders integer class ids [H, W]. Raises UserError for an id without a name."""
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"class ids are {ids.dtype} {list(ids.shape)}; expected integers [H, W]")
        is_named = np.array([bool(name) for name in self.names])
        in_range = ids.size == 0 or (ids.min() >= 0 and ids.max() < len(is_named))
        if not (in_range and is_named[ids].all()):
            unnamed = sorted(set(np.unique(ids).tolist()) - set(self.used_ids.tolist()))
            named = f"{len(self.used_ids)} named ids up to {self.used_ids[-1]}"
            raise UserError(f"class ids {unnamed[:8]} have no name; the palette has {named}")
        return PALETTE[ids]

    def parse(self, image: np.ndarray) -> UInt8[np.ndarray, "H W"]:
        """Parses class ids: the class of the nearest color."""
        used = self.used_ids
        return used[nearest_colors(check_image(image, self.kind), PALETTE[used])]

    @property
    def used_ids(self) -> UInt8[np.ndarray, " K"]:
        """The ids that have a name, ascending."""
        return np.array([i for i, name in enumerate(self.names) if name], np.uint8)


@dataclasses.dataclass(frozen=True)
class Depth(Codec):
    """Depth as gray: level 255 is `near` (bright), level 1 is `far`, linear between and clipped beyond.

    Level 0 is "no reading", as 0 is in the annotation. Depth in [near, far] is parsed to within half a level,
    (far − near) / 508.

    Attributes:
      near, far: the rendered range, in `unit`s; 0 <= near < far.
      unit: its name, such as "mm".
    """

    kind: ClassVar[str] = "depth"
    near: int | float  # stays an int in JSON
    far: int | float
    unit: str

    def __post_init__(self) -> None:
        is_number = all(isinstance(x, int | float) and type(x) is not bool for x in (self.near, self.far))
        if not (is_number and 0 <= self.near < self.far < np.inf):
            raise UserError(f"depth.near={self.near!r} and far={self.far!r} must satisfy 0 <= near < far")
        if not isinstance(self.unit, str):
            raise UserError(f"depth.unit={self.unit!r} must be a name such as 'mm'")

    def render(self, depth: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
        """Renders depth [H, W] in `unit`s, 0 for no reading. Raises UserError for NaN and negative values."""
        depth = _check_map(depth, self.kind).astype(np.float32)
        if depth.size and not depth.min() >= 0:
            raise UserError("depth has NaN or negative values; expected values >= 0, with 0 for no reading")
        level = 255 - (depth - self.near) * (254 / (self.far - self.near))
        return _gray(np.where(depth > 0, np.clip(np.rint(level), 1, 255), 0))

    def parse(self, image: np.ndarray) -> Float32[np.ndarray, "H W"]:
        """Parses depth in `unit`s; 0 for no reading (gray level below 0.5)."""
        level = _gray_level(image, self.kind)
        step = (self.far - self.near) / 254
        # With near = 0 the brightest level would be "no reading": use the middle of its interval.
        depth = np.maximum(self.near + (255 - np.maximum(level, 1)) * step, step / 4)
        return np.where(level < 0.5, 0, depth).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Edges(Codec):
    """Edge strength in [0, 1] as white on black; parsed to within half a level, 1/510."""

    kind: ClassVar[str] = "edges"

    def render(self, strength: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
        """Renders edge strength [H, W]. Raises UserError for values outside [0, 1]."""
        strength = _check_map(strength, self.kind)
        if strength.size and not (strength.min() >= 0 and strength.max() <= 1):
            raise UserError(f"edge strength is in [{strength.min()}, {strength.max()}]; expected [0, 1]")
        return _gray(np.rint(strength * 255))

    def parse(self, image: np.ndarray) -> Float32[np.ndarray, "H W"]:
        """Parses edge strength in [0, 1]."""
        return _gray_level(image, self.kind) / 255


@dataclasses.dataclass(frozen=True)
class Normals(Codec):
    """Unit vectors (x right, y down, z to the viewer) as colors (n + 1) / 2; parsed to within 0.01."""

    kind: ClassVar[str] = "normals"

    def render(self, normals: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
        """Renders unit vectors [H, W, 3]. Raises UserError for another length than 1."""
        if normals.ndim != 3 or normals.shape[2] != 3:
            raise UserError(f"normals have shape {list(normals.shape)}; expected [H, W, 3]")
        length = np.linalg.norm(normals, axis=-1)
        if not np.all(np.abs(length - 1) < 1e-3):
            raise UserError("normals are not of length 1; normalize them first")
        return np.rint((normals + 1) * 127.5).clip(0, 255).astype(np.uint8)

    def parse(self, image: np.ndarray) -> Float32[np.ndarray, "H W 3"]:
        """Parses unit vectors."""
        vectors = check_image(image, self.kind).astype(np.float32) / 127.5 - 1
        # No 8-bit color is exactly zero (127.5), so neither is the length.
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    def mirror(self, image: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
        """Mirrors the image and negates x, whose level becomes 255 minus itself."""
        mirrored = super().mirror(image)
        mirrored[..., 0] = 255 - mirrored[..., 0]
        return mirrored


CODECS: dict[str, type] = {codec.kind: codec for codec in (Image, Palette, Depth, Edges, Normals, Boxes, Pose)}


def codec_from_json(fields: Mapping[str, Any]) -> Codec:
    """Inverse of `Codec.to_json`. Raises UserError for an unknown kind and for unknown or missing fields."""
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in CODECS:
        raise UserError(f"stream codec kind={kind!r} must be one of {', '.join(CODECS)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "kind"}
    known = {field.name: field for field in dataclasses.fields(CODECS[kind])}
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    if not required <= values.keys() <= known.keys():
        raise UserError(f"stream codec of kind {kind!r} has fields {sorted(values)}; expected {list(known)}")
    return CODECS[kind](**values)


def _check_map(values: np.ndarray, kind: str) -> np.ndarray:
    if values.ndim != 2:
        raise UserError(f"{kind} has shape {list(values.shape)}; expected [H, W]")
    return values


def _gray(level: np.ndarray) -> np.ndarray:
    return np.repeat(level.astype(np.uint8)[..., None], 3, axis=-1)  # [H, W, 3]


def _gray_level(image: np.ndarray, kind: str) -> np.ndarray:
    return check_image(image, kind).mean(-1, dtype=np.float32)  # [H, W], in [0, 255]
