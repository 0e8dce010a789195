"""What the stream codecs share: the contract, the palette, and checks of what they are given."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from lvm.common.errors import UserError


@runtime_checkable
class Codec(Protocol):
    """What every stream codec does. `parse` also reads images that are not exact, as a model's are."""

    @property
    def kind(self) -> str:
        """The name of the codec's class in JSON."""

    def render(self, *annotation: Any, **options: Any) -> np.ndarray:
        """The annotation as an image, uint8 [H, W, 3]."""

    def parse(self, image: np.ndarray) -> Any:
        """The annotation in an image, uint8 [H, W, 3]."""

    def mirror(self, image: np.ndarray) -> np.ndarray:
        """The image, uint8 [H, W, 3], of the scene seen in a mirror that swaps left and right."""

    def to_json(self) -> dict[str, Any]:
        """The kind and the fields, as `codec_from_json` reads them."""


class BaseCodec:
    """A codec is a frozen dataclass below this one: JSON from its fields, and a mirror that only moves pixels."""

    kind: ClassVar[str]

    def mirror(self, image: np.ndarray) -> np.ndarray:
        """See `Codec.mirror`."""
        return check_image(image, self.kind)[:, ::-1]

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


def nearest_colors(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """For each pixel of an image [H, W, 3] the row of the nearest of the colours [K, 3], int [H, W].

    Distance is squared RGB distance; between equals the lower row wins.
    """
    pixels, palette = image.reshape(-1, 3).astype(np.float32), colours.astype(np.float32)
    # |pixel|² is the same for all colours. All terms are whole and below 2²⁴: exact in float32.
    distance = (palette**2).sum(-1) - 2 * (pixels @ palette.T)  # [H·W, K]
    return distance.argmin(-1).reshape(image.shape[:2])


def check_names(kind: str, names: Any, limit: int) -> None:
    """That class names are texts, not all of them empty and not too many; else a UserError that names them."""
    texts = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
    if not texts or not any(names) or len(names) > limit:
        raise UserError(f"{kind}.names is {str(names)[:80]}; expected 1 to {limit} class names")


def check_image(image: np.ndarray, kind: str) -> np.ndarray:
    """The image, if it is uint8 [H, W, 3]; else a UserError that says what it is."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(
            f"the image of a stream of kind {kind!r} is {image.dtype} {list(image.shape)}; "
            "expected uint8 [H, W, 3]"
        )
    return image
