"""The stream codec base class, the class palette, and checks of codec inputs."""

import abc
import dataclasses
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, UInt8

from lvm.common.errors import UserError


class Codec(abc.ABC):
    """A stream codec: renders annotations as images, and parses images, inexact ones included, into annotations.

    Subclasses are frozen dataclasses, stored as JSON in the manifest of the scenes that they rendered.
    """

    kind: ClassVar[str]

    @abc.abstractmethod
    def render(self, *args: Any, **kwargs: Any) -> UInt8[np.ndarray, "H W 3"]:
        """Renders an annotation as an image."""

    @abc.abstractmethod
    def parse(self, image: np.ndarray) -> Any:
        """Parses an image, uint8 [H, W, 3], into an annotation."""

    def mirror(self, image: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
        """The image of the scene mirrored left to right."""
        pixels = np.ascontiguousarray(check_image(image, self.kind)).view("V3")  # copied twice as fast as three bytes
        return np.ascontiguousarray(pixels[:, ::-1]).view(np.uint8)

    def to_json(self) -> dict[str, Any]:
        """The kind and the fields, as read by `codec_from_json`."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"kind": self.kind} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def _farthest_points(count: int, levels: int) -> np.ndarray:
    """Farthest-point sampling of `count` colors, uint8 [count, 3], from a lattice, beginning with black."""
    axis = np.linspace(0, 255, levels).round().astype(np.int64)
    lattice = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    chosen = [0]
    distance = np.full(len(lattice), np.iinfo(np.int64).max)
    while len(chosen) < count:
        distance = np.minimum(distance, ((lattice - lattice[chosen[-1]]) ** 2).sum(-1))
        chosen.append(int(distance.argmax()))
    return lattice[chosen].astype(np.uint8)


PALETTE = _farthest_points(256, levels=9)  # [256, 3]; stored scenes depend on it: never change it
PALETTE.flags.writeable = False


def nearest_colors(image: UInt8[np.ndarray, "H W 3"], colors: UInt8[np.ndarray, "K 3"]) -> Int[np.ndarray, "H W"]:
    """The index of the color nearest to each pixel by squared RGB distance; ties go to the lower index."""
    pixels, palette = image.reshape(-1, 3).astype(np.float32), colors.astype(np.float32)
    # |pixel|² is common to all colors. All terms are integers below 2²⁴: exact in float32.
    distance = (palette**2).sum(-1) - 2 * (pixels @ palette.T)  # [H·W, K]
    return distance.argmin(-1).reshape(image.shape[:2])


def check_names(field: str, names: Any, limit: int) -> None:
    """Raises UserError unless `names` is a tuple of 1 to `limit` strings, not all empty."""
    is_strings = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
    if not is_strings or not any(names) or len(names) > limit:
        raise UserError(f"{field}={str(names)[:80]} must be 1 to {limit} names")


def check_image(image: np.ndarray, kind: str) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the image of a stream of this kind. Raises UserError unless it is uint8 [H, W, 3]."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"image of kind {kind!r} is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3]")
    return image
