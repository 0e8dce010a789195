"""Streams derived from rgb as it is read: edges, and degraded images as inputs of restoration tasks.

Each is a function of images and of a random generator seeded by the scene's key, so that it is reproducible. The
strength of an effect is sampled once a scene; noise and rain drops are sampled for each frame.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import PIL.Image
import PIL.ImageDraw
import scipy.ndimage
import skimage.feature
from jaxtyping import Float32, UInt8

from lvm.data.streams.codecs import Codec, Edges, Image

FULL_SIZE = 256  # resolution at which lengths below are in pixels; they scale with others
EDGE_SIGMA = 1.5

Images = UInt8[np.ndarray, "T H W 3"]  # square, if an effect has a length
DeriveFn = Callable[[Images, np.random.Generator], Images]


def edges(images: Images, rng: np.random.Generator) -> Images:
    """Canny (1986) edges by scikit-image, white on black: σ 1.5 pixels, hysteresis thresholds .1 and .2."""
    edge_maps = [skimage.feature.canny(luma(image) / 255, sigma=EDGE_SIGMA) for image in images]
    return np.stack([Edges().render(edge_map) for edge_map in edge_maps])


def grayscale(images: Images, rng: np.random.Generator) -> Images:
    """Luma .2989 R + .5870 G + .1140 B."""
    return np.repeat(_to_uint8(luma(images))[..., None], 3, axis=-1)


def luma(images: UInt8[np.ndarray, "*batch 3"]) -> Float32[np.ndarray, "*batch"]:
    """Luma, in [0, 255]."""
    return images.astype(np.float32) @ np.array([0.2989, 0.5870, 0.1140], np.float32)


def masked(images: Images, rng: np.random.Generator) -> Images:
    """Black regions, the same in all frames.

    With p 0.3 one square with sides from [25, 128) pixels; otherwise patches of 32 × 32 pixels, of which a share from
    U(0, 1) is kept. Lengths are at 256 pixels.
    """
    R = images.shape[1]
    mask = np.ones((R, R), bool)
    if rng.random() < 0.3:
        side = max(1, int(rng.integers(25, 128)) * R // FULL_SIZE)
        top, left = rng.integers(0, R - side + 1, 2)
        mask[top : top + side, left : left + side] = False
    else:
        num_patches = FULL_SIZE // 32  # along a side
        share = rng.random()
        keep = rng.permutation(num_patches**2) < round(share * num_patches**2)
        patch = np.arange(R) * num_patches // R  # of each row or column
        mask = keep.reshape(num_patches, num_patches)[patch[:, None], patch]
    return images * mask[..., None].astype(np.uint8)


def noisy(images: Images, rng: np.random.Generator) -> Images:
    """Gaussian noise with a standard deviation from U(10, 50) levels."""
    sigma = rng.uniform(10, 50)
    return _to_uint8(images + sigma * rng.standard_normal(images.shape, np.float32))


def low_light(images: Images, rng: np.random.Generator) -> Images:
    """Gamma from U(1.5, 3), gain from U(0.2, 0.6), and shot noise at 50 to 200 photons for full white."""
    gamma, gain, photons = rng.uniform(1.5, 3), rng.uniform(0.2, 0.6), rng.uniform(50, 200)
    dark = gain * (images / 255) ** gamma  # [T, R, R, 3]
    return _to_uint8(rng.poisson(dark * photons) / photons * 255)


def rain(images: Images, rng: np.random.Generator) -> Images:
    """Bright streaks with a slant from U(−20°, 20°) and a density sampled for the scene, new ones in every frame."""
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
    return np.stack(frames)


def low_resolution(images: Images, rng: np.random.Generator) -> Images:
    """Downsampling by 4, 6 or 8 (box filter), and upsampling (bicubic)."""
    R = images.shape[1]
    small = max(1, R // int(rng.choice([4, 6, 8])))
    reduced = [PIL.Image.fromarray(x).resize((small, small), PIL.Image.Resampling.BOX) for x in images]
    return np.stack([np.asarray(x.resize((R, R), PIL.Image.Resampling.BICUBIC)) for x in reduced])


def rotated(images: Images, rng: np.random.Generator) -> Images:
    """Rotation by 90°, 180° or 270°, the same in all frames."""
    return np.ascontiguousarray(np.rot90(images, int(rng.integers(1, 4)), axes=(1, 2)))


# Functions and the codecs of their output, by stream.
DERIVED: dict[str, tuple[DeriveFn, Codec]] = {
    "edges": (edges, Edges()),
    "gray": (grayscale, Image()),
    "masked": (masked, Image()),
    "noisy": (noisy, Image()),
    "low_light": (low_light, Image()),
    "rain": (rain, Image()),
    "low_resolution": (low_resolution, Image()),
    "rotated": (rotated, Image()),
}


def derive(stream: str, images: Images, key: str, seed: int = 0) -> Images:
    """Computes a derived stream of a scene.

    Args:
      stream: a name in `DERIVED`.
      images: the scene's rgb.
      key: the scene's key; together with `seed` and the stream it determines all random values.
      seed: any integer.
    """
    if not len(images):
        return images
    digest = hashlib.blake2b(f"{seed}/{stream}/{key}".encode(), digest_size=16).digest()
    return DERIVED[stream][0](images, np.random.default_rng(int.from_bytes(digest, "little")))


def _to_uint8(levels: np.ndarray) -> np.ndarray:
    return np.rint(levels).clip(0, 255).astype(np.uint8)
