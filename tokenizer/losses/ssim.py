"""Structural similarity at several scales."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

WINDOW = 11  # side of the Gaussian window, of standard deviation 1.5
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first


def num_scales(resolution: int) -> int:
    """Scales that images of a side have: each halves it, and the last must hold a window."""
    return next((n for n in range(len(_WEIGHTS), 0, -1) if resolution >> (n - 1) >= WINDOW), 0)


def ms_ssim(images: Float[Array, "B H W C"], targets: Float[Array, "B H W C"]) -> Float[Array, ""]:
    """Multi-scale SSIM (Wang et al., 2003), the mean over images in [0, 1] and channels.

    Of small images the coarsest scales are left out and the weights of the others scaled to a sum of 1. H and W must be
    at least `WINDOW`. Negative factors count as 0.
    """
    weights = np.array(_WEIGHTS[: num_scales(min(images.shape[1:3]))])
    weights /= weights.sum()
    product: jax.Array | float = 1.0
    for i, weight in enumerate(weights):
        luminance, contrast = ssim_terms(images, targets)
        factor = contrast.mean((1, 2))  # [B, C]
        if i == len(weights) - 1:
            factor = (luminance * contrast).mean((1, 2))
        product = product * jnp.maximum(factor, 1e-6) ** weight  # the power has no finite gradient at 0
        images, targets = _halve(images), _halve(targets)
    return jnp.mean(product)


def ssim(images: Float[Array, "B H W C"], targets: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    """SSIM of each image, mean over channels and positions (Wang et al., 2004); sides are at least `WINDOW`."""
    luminance, contrast = ssim_terms(images, targets)
    return (luminance * contrast).mean((1, 2, 3))


def ssim_terms(
    images: Float[Array, "B H W C"], targets: Float[Array, "B H W C"]
) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
    """Luminance, and contrast times structure, at every position of the window; SSIM is their product.

    Moments are weighted by the window (Wang et al., 2004, with K₁ = 0.01, K₂ = 0.03 and a range of 1).
    """
    x, y = images.astype(jnp.float32), targets.astype(jnp.float32)
    mean_x, mean_y = _blur(x), _blur(y)
    variances = _blur(x * x) - mean_x**2 + _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    return luminance, (2 * covariance + 0.03**2) / (variances + 0.03**2)


def _blur(x: jax.Array) -> jax.Array:
    """Means weighted by the window, where it fits."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    # Banded matrices: convolutions of single channels are slow on every device.
    height, width = (
        sum(np.eye(side, side - WINDOW + 1, -i, np.float32) * w for i, w in enumerate(window / window.sum()))
        for side in x.shape[1:3]
    )
    return jnp.einsum("bhwc,hi,wj->bijc", x, height, width, precision="highest")


def _halve(x: jax.Array) -> jax.Array:
    B, H, W, C = x.shape
    return x[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))
