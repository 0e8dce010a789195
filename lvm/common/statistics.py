"""PSNR, entropy and perplexity of NumPy or JAX arrays, computed in the array's own namespace."""

from typing import TypeVar

import numpy as np
from jaxtyping import Array, Float, Shaped

A = TypeVar("A", Array, np.ndarray)


def psnr(images: Shaped[A, "B H W C"], targets: Shaped[A, "B H W C"]) -> Float[A, " B"]:
    """Peak signal-to-noise ratio in dB of each image, at most 100.

    Both are uint8 (compared in float64 by NumPy), or float in [0, 1], to which `images` is clipped.
    """
    xp = images.__array_namespace__()
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        # One image at a time: held-out images are many, and float64 takes eight times as much.
        pairs = zip(images, targets, strict=True)
        mean_squared = np.array([np.mean(np.square(image.astype(np.float64) - target)) for image, target in pairs])
        return -10 * np.log10(np.maximum(mean_squared / 255**2, 1e-10))
    if images.dtype == xp.uint8:
        images, targets = images / 255, targets / 255
    mean_squared = xp.mean(xp.square(xp.clip(images, 0.0, 1.0) - targets), axis=(1, 2, 3))
    return -10 * xp.log10(xp.maximum(mean_squared, 1e-10))


def entropy(counts: Shaped[A, "*shape"]) -> Float[A, ""]:
    """Entropy in nats of the distribution given by counts or probabilities (the plug-in estimate); 0 for no counts."""
    xp = counts.__array_namespace__()
    if isinstance(counts, np.ndarray):
        counts = counts[counts > 0]  # joint counts of codes are large and sparse
    p = counts / xp.maximum(counts.sum(), 1)
    return xp.asarray(-xp.sum(p * xp.log(xp.where(p > 0, p, 1))))


def perplexity(counts: Shaped[A, "*shape"]) -> Float[A, ""]:
    """Exponential of the entropy: the effective number of codes."""
    xp = counts.__array_namespace__()
    return xp.asarray(xp.exp(entropy(counts)))
