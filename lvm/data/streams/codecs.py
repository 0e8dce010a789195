"""Stream codecs: how an annotation becomes an image, and how it is read back from one.

A model only ever sees and writes images, so what a stream means is decided here and nowhere else. A codec is
a small frozen value with `render` and `parse`; it is stored as JSON in the manifest of the scenes it drew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from lvm.common.errors import UserError
from lvm.data.streams.base import PALETTE, BaseCodec, Codec, check_image, check_names, nearest_colors
from lvm.data.streams.geometry import Box, Boxes, Pose

__all__ = [
    "CODECS", "PALETTE", "Box", "Boxes", "Codec", "Depth", "Edges", "Image", "Normals", "Palette", "Pose",
    "codec_from_json", "mirror_scene", "nearest_colors",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Image(BaseCodec):
    """Photographs, drawn poses and whatever else is an image already: nothing to draw, nothing to read."""

    kind: ClassVar[str] = "image"

    def render(self, image: np.ndarray) -> np.ndarray:
        """The image itself, uint8 [H, W, 3]."""
        return check_image(image, "image")

    def parse(self, image: np.ndarray) -> np.ndarray:
        """The image itself, uint8 [H, W, 3]."""
        return check_image(image, "image")


@dataclasses.dataclass(frozen=True)
class Palette(BaseCodec):
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
        check_names(self.kind, self.names, limit=len(PALETTE))
        for field in ("background", "ignore"):
            value = getattr(self, field)
            if value is not None and not (_is_int(value) and 0 <= value < len(self.names)):
                raise UserError(
                    f"palette.{field} is {value!r}; expected a class id in [0, {len(self.names)}) or none"
                )

    def render(self, ids: np.ndarray) -> np.ndarray:
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
        return used[nearest_colors(check_image(image, self.kind), PALETTE[used])]  # [H, W]

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
class Depth(BaseCodec):
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

    def render(self, depth: np.ndarray) -> np.ndarray:
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
class Edges(BaseCodec):
    """Edge strength in [0, 1] as white on black; read back to within half a level, 1/510."""

    kind: ClassVar[str] = "edges"

    def render(self, strength: np.ndarray) -> np.ndarray:
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
class Normals(BaseCodec):
    """Unit vectors (x right, y down, z to the viewer) as colours (n + 1) / 2; read back to within 0.01."""

    kind: ClassVar[str] = "normals"

    def render(self, normals: np.ndarray) -> np.ndarray:
        """Unit vectors [H, W, 3] as colours, uint8 [H, W, 3]. Raises UserError for another length than 1."""
        if normals.ndim != 3 or normals.shape[2] != 3:
            raise UserError(f"normals have shape {list(normals.shape)}; expected [H, W, 3]")
        length = np.linalg.norm(normals, axis=-1)
        if not np.all(np.abs(length - 1) < 1e-3):
            raise UserError("normals are not of length 1; normalize them first")
        return np.rint((normals + 1) * 127.5).clip(0, 255).astype(np.uint8)  # [H, W, 3]

    def parse(self, image: np.ndarray) -> np.ndarray:
        """Unit vectors, float32 [H, W, 3]."""
        vectors = check_image(image, self.kind).astype(np.float32) / 127.5 - 1
        # No 8-bit colour is exactly zero (127.5), so the length never is.
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)  # [H, W, 3]

    def mirror(self, image: np.ndarray) -> np.ndarray:
        """See `Codec.mirror`: the colour of −x is 255 minus that of x."""
        mirrored = super().mirror(image).copy()
        mirrored[..., 0] = 255 - mirrored[..., 0]
        return mirrored

    def flip(self, normals: np.ndarray) -> np.ndarray:
        """The normals [H, W, 3] of the mirrored scene: columns reversed and x negated."""
        return normals[:, ::-1] * np.array([-1, 1, 1], normals.dtype)


CODECS: dict[str, type] = {
    codec.kind: codec for codec in (Image, Palette, Depth, Edges, Normals, Boxes, Pose)
}


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


def mirror_scene(images: np.ndarray, codecs: Sequence[Codec]) -> np.ndarray:
    """A scene uint8 [T, S, R, R, 3], its streams drawn by `codecs`, as a mirror shows it: all streams or none."""
    columns = [np.stack([codec.mirror(frame) for frame in images[:, s]]) for s, codec in enumerate(codecs)]
    return np.stack(columns, axis=1)


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
    return check_image(image, kind).mean(-1, dtype=np.float32)  # [H, W]
