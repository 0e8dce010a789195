"""A frozen codebook behind a learned linear map."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lvm.model.nnx_utils import Params
from tokenizer.quantizers.base import NearestQuantizer


@dataclasses.dataclass(frozen=True)
class SimVQ(NearestQuantizer):
    """Rows are a frozen random codebook times a learned matrix (SimVQ, arXiv 2411.02038).

    Every step moves all rows, so that none dies.
    """

    kind: ClassVar[str] = "simvq"

    @property
    def trained(self) -> tuple[str, ...]:
        """See `Quantizer.trained`."""
        return ("projection",)

    def init(self, codebook_size: int, codebook_dim: int, rng: jax.Array) -> Params:
        """`codebook` float32 [K, C], normal, rows of about unit length; `projection` float32 [C, C], identity."""
        codebook = jax.random.normal(rng, (codebook_size, codebook_dim)) * codebook_dim**-0.5
        return {"codebook": codebook, "projection": jnp.eye(codebook_dim)}

    def rows(self, params: Params) -> Float[Array, "K C"]:
        """The projected codebook."""
        return jnp.matmul(params["codebook"], params["projection"], precision="highest")
