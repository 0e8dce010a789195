"""The protocol of perceptual losses, and those without weights."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float

from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative
from lvm.interop import tensors as interop
from lvm.model.nnx_utils import Params
from tokenizer import weights
from tokenizer.losses.ssim import WINDOW, ms_ssim

Shape = tuple[int, ...]
# Of ImageNet.
_MEAN, _STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
_CLASSIFIER_SIZE = 224  # side of the images that classifiers of ImageNet were trained with


class Perceptual(abc.ABC):
    """A distance of images; a family of dataclasses selected by `kind`.

    Attributes:
      weight: of the loss; 0 leaves it out.
      min_resolution: smallest side of an image.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Perceptual]]] = {}
    min_resolution: ClassVar[int] = 1
    weight: float = 0.0

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            Perceptual.kinds[cls.kind] = cls

    def tensor_shapes(self) -> dict[str, Shape]:
        """Names and shapes of the weights, as torchvision has them."""
        return {}

    def load(self, setting: str = "config.loss.perceptual.") -> Params:
        """Reads the weights, float32, convolutions as HWIO.

        Args:
          setting: what a field's name follows in its key, for errors.

        Raises:
          UserError: no path, a file that can't be read, or the tensors of another network.
        """
        return {}

    def init(self) -> Params:
        """Zeros in place of the weights."""
        return to_params({name: np.zeros(shape, np.float32) for name, shape in self.tensor_shapes().items()})

    @abc.abstractmethod
    def distance(
        self, params: Params, images: Float[Array, "B H W 3"], targets: Float[Array, "B H W 3"], dtype: str
    ) -> Float[Array, ""]:
        """Mean distance of images in [0, 1] from their targets, float32; convolutions run in `dtype`."""


@dataclasses.dataclass(frozen=True)
class NoPerceptual(Perceptual):
    """No perceptual loss."""

    kind: ClassVar[str] = "none"

    def distance(
        self, params: Params, images: Float[Array, "B H W 3"], targets: Float[Array, "B H W 3"], dtype: str
    ) -> Float[Array, ""]:
        """0."""
        return jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class MultiScaleSSIM(Perceptual):
    """1 − MS-SSIM (`tokenizer.losses.ssim`), which needs no weights; with `adversarial.feature_matching` it takes the
    place of a classifier's features."""

    kind: ClassVar[str] = "ms_ssim"
    min_resolution: ClassVar[int] = WINDOW
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_non_negative(self, "weight")

    def distance(
        self, params: Params, images: Float[Array, "B H W 3"], targets: Float[Array, "B H W 3"], dtype: str
    ) -> Float[Array, ""]:
        """See `Perceptual.distance`."""
        return 1 - ms_ssim(images, targets)


@dataclasses.dataclass(frozen=True)
class ClassifierLoss(Perceptual):
    """Mean squared difference of the logits of a classifier of ImageNet (VQGAN+, arXiv 2409.16211).

    Images are resized to 224×224, bilinear with antialiasing, and normalized by ImageNet's mean and deviation.

    Attributes:
      weights: file with torchvision's weights, .pth or .safetensors.
    """

    url: ClassVar[str]
    min_resolution: ClassVar[int] = 32
    weight: float = 0.1
    weights: str = ""

    def __post_init__(self) -> None:
        check_non_negative(self, "weight")

    def load(self, setting: str = "config.loss.perceptual.") -> Params:
        """See `Perceptual.load`."""
        key = f"{setting}weights"
        return to_params(read_weights(self.weights, self.tensor_shapes(), key, self.kind, self.url))

    @abc.abstractmethod
    def logits(self, params: Params, images: Float[Array, "B 224 224 3"], dtype: str) -> Float[Array, "B classes"]:
        """Logits of normalized images."""

    def distance(
        self, params: Params, images: Float[Array, "B H W 3"], targets: Float[Array, "B H W 3"], dtype: str
    ) -> Float[Array, ""]:
        """See `Perceptual.distance`."""
        ours, theirs = (self.logits(params, _classifier_input(x), dtype).astype(jnp.float32) for x in (images, targets))
        return jnp.mean(jnp.square(ours - theirs))


def normalize_colors(images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Images in [0, 1] with ImageNet's mean and deviation as 0 and 1."""
    return (images - _MEAN) / _STD


def _classifier_input(images: jax.Array) -> jax.Array:
    size = _CLASSIFIER_SIZE
    if images.shape[1:3] != (size, size):
        images = jax.image.resize(images, (len(images), size, size, 3), "bilinear", antialias=True)
    return normalize_colors(images)


def read_weights(path: str, shapes: Mapping[str, Shape], key: str, kind: str, url: str) -> dict[str, np.ndarray]:
    """Reads the named tensors of a file; it may have others.

    Raises:
      UserError: see `Perceptual.load`; `key` is the path's setting.
    """
    if not path:
        raise UserError(f"{key} is empty; {kind} needs weights, which {url} has; nothing is downloaded")
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"{key}={path}: no such file; {url} has it")
    tensors = weights.read_tensors(file)
    interop.check_shapes({name: tensors[name] for name in shapes if name in tensors}, shapes, file)
    arrays = {name: tensors[name].read().astype(np.float32) for name in shapes}
    for name, array in arrays.items():
        interop.check_finite(array, f"{file}: {name}")
    return arrays


def to_params(tensors: Mapping[str, np.ndarray]) -> Params:
    """Nested arrays of flat tensors, convolutions from OIHW to HWIO and matrices from [out, in] to [in, out]."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}
    arrays = {name: jnp.asarray(x.transpose(axes.get(x.ndim, range(x.ndim)))) for name, x in tensors.items()}
    return unflatten_dict(arrays, sep=".")
