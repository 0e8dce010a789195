"""Index backpropagation quantization."""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Float, Int

from lvm.common.validation import check_non_negative, check_positive
from lvm.model.nnx_utils import Params
from tokenizer.quantizers.base import Quantized, Quantizer, mean_square, reject_unused
from tokenizer.quantizers.nearest import lookup, nearest_codes, products
from tokenizer.quantizers.softmax import entropies, soft_lookup


@dataclasses.dataclass(frozen=True)
class IBQ(Quantizer):
    """Straight-through over the softmax of all codes, so that every row gets gradients (IBQ, arXiv 2412.02692).

    A code is the row with the largest dot product. The one-hot choice has the gradient of softmax(z·e).

    Attributes:
      quantization: weight of the mean squared distance between latent and vector, with gradients to both.
      commitment: of the same with the row held constant.
      codebook: of the same with the latent held constant.
      entropy: weight of the entropy penalty (`softmax.entropies`) on the dot products; 0 leaves it out.
      temperature: divides them.
    """

    kind: ClassVar[str] = "ibq"
    quantization: float = 1.0
    commitment: float = 1.0
    codebook: float = 0.25
    entropy: float = 0.05
    temperature: float = 0.01

    def __post_init__(self) -> None:
        check_non_negative(self, "quantization", "commitment", "codebook", "entropy")
        check_positive(self, "temperature")
        reject_unused(self, self.entropy == 0, "temperature", "entropy=0")

    @property
    def trained(self) -> tuple[str, ...]:
        """See `Quantizer.trained`."""
        return ("codebook",)

    def init(self, codebook_size: int, codebook_dim: int, rng: jax.Array) -> Params:
        """`codebook` float32 [K, C], uniform in ±1/K."""
        limit = 1 / codebook_size
        return {"codebook": jax.random.uniform(rng, (codebook_size, codebook_dim), minval=-limit, maxval=limit)}

    def quantize(self, params: Params, latents: Float[Array, "*n C"]) -> Quantized:
        """Quantizes to the rows with the largest dot products; see `Quantizer.quantize`."""
        rows, constant = params["codebook"], jax.lax.stop_gradient
        codes = nearest_codes(constant(latents), constant(rows), affinity=products)
        hard, soft = lookup(codes, rows), soft_lookup(latents, rows, products)
        vectors = hard + (soft - constant(soft))
        losses = {
            "quantization": mean_square(vectors - latents),
            "commitment": mean_square(constant(hard) - latents),
            "codebook": mean_square(hard - constant(latents)),
        }
        if self.entropy:
            of_samples, of_mean = entropies(latents, rows, products, self.temperature)
            losses["entropy"] = of_samples - of_mean
        return Quantized(codes, vectors, losses, {"quantization_error": losses["commitment"]})

    def lookup(self, params: Params, codes: Int[Array, "*n"]) -> Float[Array, "*n C"]:
        """Rows of the codes; see `Quantizer.lookup`."""
        return lookup(codes, params["codebook"])
