"""The protocol of quantizers, and what those with a codebook share."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lvm.common.config import to_json
from lvm.common.errors import UserError
from lvm.common.validation import check_choice, check_non_negative, check_positive
from lvm.model.nnx_utils import Params
from tokenizer.quantizers import gradients
from tokenizer.quantizers.nearest import lookup, nearest_codes, products_to_rows
from tokenizer.quantizers.softmax import entropies


class Quantized(NamedTuple):
    """Quantized latents.

    Attributes:
      codes: int32.
      vectors: what the decoder gets; their gradient reaches the latents.
      losses: terms of the loss; the weight of each is the quantizer's field of the same name.
      statistics: for the metrics.
    """

    codes: Int[Array, "*n"]
    vectors: Float[Array, "*n C"]
    losses: dict[str, Float[Array, ""]]
    statistics: dict[str, Float[Array, ""]]


class Quantizer(abc.ABC):
    """Latents of C channels to K codes and back; a family of dataclasses selected by `kind`.

    All methods are pure functions of float32 arrays, for any leading dimensions of latents and codes.

    Attributes:
      code_fields: fields that the meaning of a code depends on, besides the parameters. All others concern training.
      trained: names of the parameters that get gradients; an optimizer updates them.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Quantizer]]] = {}
    code_fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            Quantizer.kinds[cls.kind] = cls

    @property
    def trained(self) -> tuple[str, ...]:
        return ()

    def describe(self) -> dict[str, Any]:
        """The kind and `code_fields`, as JSON: equal for quantizers whose parameters are interchangeable."""
        fields = to_json(self)
        return {name: fields[name] for name in ("kind", *self.code_fields)}

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """The only number of codes and of channels that the quantizer can have, if its fields determine them."""
        return None

    def init(self, codebook_size: int, codebook_dim: int, rng: jax.Array) -> Params:
        """Initial parameters, a flat dict."""
        return {}

    def init_state(self, params: Params) -> Params:
        """The state that `update` keeps between steps, for these parameters."""
        return {}

    def seed(self, params: Params, latents: Float[Array, "N C"], rng: jax.Array) -> Params:
        """Parameters to begin quantization with, given a batch of latents of a trained encoder."""
        return params

    def prepare(self, latents: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        """Latents in the space of `lookup`, before they are quantized; `quantize` takes such."""
        return latents

    @abc.abstractmethod
    def quantize(self, params: Params, latents: Float[Array, "*n C"]) -> Quantized:
        """Quantizes prepared latents."""

    @abc.abstractmethod
    def lookup(self, params: Params, codes: Int[Array, "*n"]) -> Float[Array, "*n C"]:
        """The vectors of codes; codes outside [0, K) are clipped."""

    def update(
        self, params: Params, state: Params, latents: Float[Array, "N C"], codes: Int[Array, " N"], rng: jax.Array
    ) -> tuple[Params, Params]:
        """Parameters and state after a step's optimizer update, given the latents that it quantized and their codes."""
        return params, state


@dataclasses.dataclass(frozen=True)
class NearestQuantizer(Quantizer):
    """A quantizer whose codes are those of the nearest rows of a codebook (VQ-VAE, arXiv 1711.00937).

    Attributes:
      commitment: weight of the mean squared distance of latents from their vectors, constant in the vectors (eq. 3).
      codebook: weight of the same distance, constant in the latents, where rows get gradients.
      entropy: weight of the entropy penalty (`softmax.entropies`) on the negative squared distances; 0 leaves it out.
      temperature: divides them; 0.01 in MaskGIT.
      gradient: "straight_through", or "rotation": the rotation trick (arXiv 2410.06424).
    """

    commitment: float = 0.25
    codebook: float = 1.0
    entropy: float = 0.0
    temperature: float = 0.01
    gradient: str = "straight_through"

    def __post_init__(self) -> None:
        check_non_negative(self, "commitment", "codebook", "entropy")
        check_positive(self, "temperature")
        check_choice(self, "gradient", tuple(gradients.ESTIMATORS))
        reject_unused(self, self.entropy == 0, "temperature", "entropy=0")

    @abc.abstractmethod
    def rows(self, params: Params) -> Float[Array, "K C"]:
        """The vector of each code."""

    def quantize(self, params: Params, latents: Float[Array, "*n C"]) -> Quantized:
        """Quantizes to the nearest rows; see `Quantizer.quantize`."""
        rows = self.rows(params)
        codes = nearest_codes(latents, jax.lax.stop_gradient(rows))
        selected = lookup(codes, rows)
        losses = {"commitment": mean_square(latents - jax.lax.stop_gradient(selected))}
        if self.trained:
            losses["codebook"] = mean_square(jax.lax.stop_gradient(latents) - selected)
        if self.entropy:
            of_samples, of_mean = entropies(latents, rows, products_to_rows, self.temperature / 2)
            losses["entropy"] = of_samples - of_mean
        vectors = gradients.ESTIMATORS[self.gradient](latents, selected)
        return Quantized(codes, vectors, losses, {"quantization_error": losses["commitment"]})

    def lookup(self, params: Params, codes: Int[Array, "*n"]) -> Float[Array, "*n C"]:
        """Rows of the codes; see `Quantizer.lookup`."""
        return lookup(codes, self.rows(params))


def mean_square(difference: Float[Array, "*n C"]) -> Float[Array, ""]:
    """Mean of the squares."""
    return jnp.mean(jnp.square(difference))


def reject_unused(config: Any, is_unused: bool, name: str, setting: str) -> None:
    """Raises UserError if a field is unused because of another setting and not at its default."""
    default = next(field.default for field in dataclasses.fields(config) if field.name == name)
    if is_unused and (value := getattr(config, name)) != default:
        raise UserError(f"{name}={value!r} has no effect with {setting}; leave it at {default!r}")
