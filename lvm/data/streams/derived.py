"""Streams computed from rgb while it is read: edges, and what an image is to be restored from.

Each is a function of images uint8 [T, R, R, 3] and of a random generator that is seeded by the scene's key, so that a
scene always looks the same. How strong an effect is, is drawn once for a scene; what is fresh in every frame (noise,
drops of rain) is drawn for each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import PIL.Image
import PIL.ImageDraw
import scipy.ndimage
import skimage.feature

from lvm.data.streams.codecs import Codec, Edges, Image

FULL_SIZE = 256  # what lengths in pixels below are meant at; other resolutions have them in proportion
EDGE_SIGMA = 1.5

Derive = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def edges(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Edges by Canny (1986), white on black, as scikit-image finds them: σ 1.5 pixels, hysteresis from .1 to .2."""
    found = [skimage.feature.canny(luma(image) / 255, sigma=EDGE_SIGMA) for image in images]
    return np.stack([Edges().render(edge) for edge in found])  # [T, R, R, 3]


def grayscale(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Luma .2989 R + .5870 G + .1140 B."""
    return np.repeat(_to_uint8(luma(images))[..., None], 3, axis=-1)  # [T, R, R, 3]


def luma(images: np.ndarray) -> np.ndarray:
    """Luma of images uint8 [..., 3], float32 [...] in [0, 255]."""
    return images.astype(np.float32) @ np.array([0.2989, 0.5870, 0.1140], np.float32)


def masked(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Parts made black, the same in all frames.

    With p 0.3 one square of a side from [25, 128) pixels anywhere inside; else of the patches of 32 × 32 pixels a share
    is kept that is drawn from U(0, 1). Lengths are of 256 pixels.
    """
    R = images.shape[1]
    kept = np.ones((R, R), bool)
    if rng.random() < 0.3:
        side = max(1, int(rng.integers(25, 128)) * R // FULL_SIZE)
        top, left = rng.integers(0, R - side + 1, 2)
        kept[top : top + side, left : left + side] = False
    else:
        number = FULL_SIZE // 32  # patches a side
        share = rng.random()
        chosen = rng.permutation(number**2) < round(share * number**2)
        places = np.arange(R) * number // R
        kept = chosen.reshape(number, number)[places[:, None], places]
    return images * kept[..., None].astype(np.uint8)  # [T, R, R, 3]


def noisy(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of a standard deviation from U(10, 50) levels, its own for every frame, pixel and channel."""
    sigma = rng.uniform(10, 50)
    return _to_uint8(images + sigma * rng.standard_normal(images.shape, np.float32))


def low_light(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A gamma from U(1.5, 3), what is left times U(0.2, 0.6), and shot noise of 50 to 200 photons at full white."""
    gamma, gain, photons = rng.uniform(1.5, 3), rng.uniform(0.2, 0.6), rng.uniform(50, 200)
    dark = gain * (images / 255) ** gamma  # [T, R, R, 3]
    return _to_uint8(rng.poisson(dark * photons) / photons * 255)


def rain(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bright streaks, at a slant from U(−20°, 20°) and as dense as drawn for the scene, new ones in every frame."""
    R = images.shape[1]
    scale = R / FULL_SIZE
    slant, density, length = rng.uniform(-20, 20), rng.uniform(0.5, 2.0), rng.uniform(12, 30) * scale
    strength = rng.uniform(0.5, 0.9)
    step = length * np.array([np.sin(np.deg2rad(slant)), np.cos(np.deg2rad(slant))])
    frames = []
    for image in images:
        layer = PIL.Image.new("L", (R, R))
        draw = PIL.ImageDraw.Draw(layer)
        for start in rng.uniform(-length, R, (max(1, round(256 * density)), 2)):
            draw.line([tuple(start), tuple(start + step)], int(rng.integers(128, 256)), max(1, round(scale)))
        drops = scipy.ndimage.gaussian_filter(np.asarray(layer, np.float32) / 255, 0.5 * scale)[..., None]
        frames.append(_to_uint8(image + strength * drops * (255 - image.astype(np.float32))))
    return np.stack(frames)  # [T, R, R, 3]


def low_resolution(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Reduced by 4, 6 or 8 (box filter), and brought back to its size (bicubic)."""
    R = images.shape[1]
    small = max(1, R // int(rng.choice([4, 6, 8])))
    pictures = [
        PIL.Image.fromarray(image).resize((small, small), PIL.Image.Resampling.BOX) for image in images
    ]
    return np.stack([np.asarray(p.resize((R, R), PIL.Image.Resampling.BICUBIC)) for p in pictures])


def rotated(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turned by 90°, 180° or 270°, all frames alike."""
    return np.ascontiguousarray(np.rot90(images, int(rng.integers(1, 4)), axes=(1, 2)))


# The functions and the codecs of what they draw, by the stream's name.
DERIVED: dict[str, tuple[Derive, Codec]] = {
    "edges": (edges, Edges()),
    "gray": (grayscale, Image()),
    "masked": (masked, Image()),
    "noisy": (noisy, Image()),
    "low_light": (low_light, Image()),
    "rain": (rain, Image()),
    "low_resolution": (low_resolution, Image()),
    "rotated": (rotated, Image()),
}


def derive(stream: str, images: np.ndarray, key: str, seed: int = 0) -> np.ndarray:
    """A derived stream of a scene.

    Args:
      stream: a name in `DERIVED`.
      images: its rgb, uint8 [T, R, R, 3].
      key: the scene's; with `seed` and the stream it decides all that is drawn.
      seed: another one for other draws.

    Returns:
      uint8 [T, R, R, 3].
    """
    if not len(images):
        return images
    digest = hashlib.blake2b(f"{seed}/{stream}/{key}".encode(), digest_size=16).digest()
    return DERIVED[stream][0](images, np.random.default_rng(int.from_bytes(digest, "little")))


def _to_uint8(levels: np.ndarray) -> np.ndarray:
    return np.rint(levels).clip(0, 255).astype(np.uint8)
