"""Plain vector quantization, and its variant on the unit sphere."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lvm.common.errors import UserError
from lvm.common.validation import check_choice, check_non_negative
from lvm.model.nnx_utils import Params
from tokenizer.quantizers.base import NearestQuantizer, reject_unused
from tokenizer.quantizers.nearest import normalize


@dataclasses.dataclass(frozen=True)
class VQ(NearestQuantizer):
    """A codebook that follows the latents (VQ-VAE, arXiv 1711.00937), with a reset of dead codes.

    A code is dead if its averaged count per step is below `dead_below`; its row becomes a random latent of the batch
    (as in Jukebox, arXiv 2005.00341).

    Attributes:
      learning: "ema": rows are moving averages of their latents (appendix A.1); "gradient": of the loss `codebook`.
      ema_decay: of the averages of rows and counts.
      dead_below: 0 resets none.
    """

    kind: ClassVar[str] = "vq"
    learning: str = "ema"
    ema_decay: float = 0.97
    dead_below: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "learning", ("ema", "gradient"))
        check_non_negative(self, "dead_below")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must be in [0, 1)")
        reject_unused(self, self.learning == "ema", "codebook", "learning='ema'")

    @property
    def trained(self) -> tuple[str, ...]:
        """See `Quantizer.trained`."""
        return ("codebook",) if self.learning == "gradient" else ()

    def init(self, codebook_size: int, codebook_dim: int, rng: jax.Array) -> Params:
        """`codebook` float32 [K, C], random rows of unit length."""
        return {"codebook": normalize(jax.random.normal(rng, (codebook_size, codebook_dim)))}

    def init_state(self, params: Params) -> Params:
        """`counts` float32 [K], all 1, and for moving averages `sums` float32 [K, C]."""
        counts = {"counts": jnp.ones(params["codebook"].shape[0])}
        return counts if self.trained else counts | {"sums": params["codebook"]}

    def seed(self, params: Params, latents: Float[Array, "N C"], rng: jax.Array) -> Params:
        """Random latents as rows."""
        return {"codebook": sample_latents(latents, params["codebook"].shape[0], rng)}

    def rows(self, params: Params) -> Float[Array, "K C"]:
        """The codebook itself."""
        return params["codebook"]

    def update(
        self, params: Params, state: Params, latents: Float[Array, "N C"], codes: Int[Array, " N"], rng: jax.Array
    ) -> tuple[Params, Params]:
        """One step of the moving averages, then the reset of dead codes; see `Quantizer.update`."""
        K, decay = state["counts"].shape[0], self.ema_decay
        counts = jax.ops.segment_sum(jnp.ones(codes.shape), codes, num_segments=K)  # [K]
        counts = decay * state["counts"] + (1 - decay) * counts
        dead = counts < self.dead_below  # [K]
        counts, replacements = jnp.where(dead, 1.0, counts), sample_latents(latents, K, rng)
        if self.trained:
            return {"codebook": jnp.where(dead[:, None], replacements, params["codebook"])}, {"counts": counts}
        sums = jax.ops.segment_sum(latents, codes, num_segments=K)  # [K, C]
        sums = jnp.where(dead[:, None], replacements, decay * state["sums"] + (1 - decay) * sums)
        return {"codebook": self.prepare(sums / counts[:, None])}, {"counts": counts, "sums": sums}


@dataclasses.dataclass(frozen=True)
class L2VQ(VQ):
    """Vector quantization with latents and rows of unit length (ViT-VQGAN, arXiv 2110.04627).

    Published with few dimensions: `codebook_dim` 32 there, 8 in LlamaGen (arXiv 2406.06525).
    """

    kind: ClassVar[str] = "l2_vq"

    def prepare(self, latents: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        """Latents of unit length."""
        return normalize(latents)

    def rows(self, params: Params) -> Float[Array, "K C"]:
        """Rows of unit length."""
        return normalize(params["codebook"])


def sample_latents(latents: Float[Array, "N C"], count: int, rng: jax.Array) -> Float[Array, "{count} C"]:
    """`count` random rows, without replacement while they last."""
    num_rows = latents.shape[0]
    shuffled = jax.random.permutation(rng, num_rows)  # [N]
    return latents[shuffled[jnp.arange(count) % num_rows]]
