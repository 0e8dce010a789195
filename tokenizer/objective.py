"""How a tokenizer learns: what `lvm.training`'s loop runs (the Trainable contract).

First a plain autoencoder, then the codebook is seeded from the encoder's outputs, then vector quantization
with a straight-through gradient. The codebook follows moving averages and gets no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lvm.common import statistics
from lvm.common.errors import UserError
from lvm.model import nnx_utils
from lvm.model.nnx_utils import Params
from lvm.training.task import Batch, Metrics, State, apply_if_finite, init_skip_counts
from tokenizer import losses, quantizers
from tokenizer.network import VQGAN, VQGANConfig


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses, and how the codebook is learned."""

    l1: float = 1.0
    l2: float = 4.0
    gradient: float = 0.5
    commitment: float = 0.25
    autoencoder_steps: int = 10_000  # steps before there is a codebook
    ema_decay: float = 0.97  # of the codebook's moving averages
    dead_below: float = 0.1  # a code with a lower averaged count a batch is replaced

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "gradient", "commitment", "dead_below"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: {getattr(self, name)}, expected 0 or more")
        if self.autoencoder_steps < 0:
            raise UserError(f"autoencoder_steps: {self.autoencoder_steps}, expected 0 or more")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay: {self.ema_decay}, expected [0, 1)")


class TokenizerObjective:
    """The tokenizer's `init` and `update`: pure and jittable, the same bits from the same arguments.

    The state is {"step": int32, "params": …, "training": {"optimizer": …, "averages": …, "skipped": …}}, of which
    "params", the codebook among them, is all that inference needs.
    """

    def __init__(
        self,
        config: VQGANConfig,
        loss: LossConfig,
        optimizer: optax.GradientTransformation,
        schedule: Callable[[jax.Array], jax.Array],
        *,
        batch_size: int,
        has_codebook: bool = False,
    ):
        if batch_size < 1:
            raise UserError(f"config.batch_size: {batch_size} is not positive")
        self.config = config
        self.loss = loss
        self.optimizer = optimizer
        self.schedule = schedule
        # A codebook that is there from the start is never seeded.
        self.seed_step = -1 if has_codebook else loss.autoencoder_steps
        self.batch_size = batch_size
        self.graphdef, _ = nnx_utils.abstract_module(self._make)
        self.logical_axes = nnx_utils.logical_axes(self._make)

    def _make(self, rngs: nnx.Rngs) -> VQGAN:
        return VQGAN(self.config, rngs)

    def model(self, params: Params) -> VQGAN:
        """The network around `params`; works under jit."""
        return nnx_utils.merge(self.graphdef, params)

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The names, shapes and dtypes of a batch: `images` uint8 [B, R, R, 3]."""
        side = self.config.resolution
        return {"images": jax.ShapeDtypeStruct((self.batch_size, side, side, 3), jnp.uint8)}

    def init(self, rng: jax.Array) -> State:
        """The state before the first step, a pure function of `rng`."""
        params = nnx_utils.init_params(self._make, rng)
        training = {
            "optimizer": self.optimizer.init(_network(params)),
            "averages": quantizers.init_moving_averages(params["codebook"]),
            "skipped": init_skip_counts(),
        }
        return {"step": jnp.zeros((), jnp.int32), "params": params, "training": training}

    def update(self, state: State, batch: Batch, rng: jax.Array) -> tuple[State, Metrics]:
        """One step on images uint8 [B, R, R, 3]; metrics are float32 scalars of this batch."""
        step, params, training = state["step"], state["params"], state["training"]
        network = _network(params)
        seed_rng, reset_rng = jax.random.split(rng)
        gradient_of = jax.value_and_grad(self._loss, has_aux=True)
        (loss, (seen, metrics)), gradients = gradient_of(
            network, params["codebook"], to_float(batch["images"]), step, seed_rng
        )

        updates, optimizer_state = self.optimizer.update(gradients, training["optimizer"], network)
        averages, codebook = self._learn_codebook(seen, training["averages"], step, reset_rng)
        grad_norm = optax.tree.norm(gradients)
        old = {"params": params, "optimizer": training["optimizer"], "averages": training["averages"]}
        new = {
            "params": optax.apply_updates(network, updates) | {"codebook": codebook},
            "optimizer": optimizer_state,
            "averages": averages,
        }
        new, skipped = apply_if_finite(jnp.isfinite(grad_norm), new, old, training["skipped"])
        params = new.pop("params")
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(_network(params)),
            "learning_rate": jnp.asarray(self.schedule(step), jnp.float32),
            **skipped,
        }
        return {"step": step + 1, "params": params, "training": {**new, "skipped": skipped}}, metrics

    def _loss(
        self, network: Params, codebook: jax.Array, images: jax.Array, step: jax.Array, rng: jax.Array
    ) -> tuple[jax.Array, tuple[Params, Metrics]]:
        model = self.model(network | {"codebook": codebook})
        latents = model.encode_latents(images)  # [B, h, w, C]
        rows = jax.lax.stop_gradient(latents.reshape(-1, latents.shape[-1]))  # [N, C]
        codebook = jax.lax.cond(
            step == self.seed_step,
            lambda: quantizers.sample_latents(rows, self.config.codebook_size, rng),
            lambda: codebook,
        )
        codes = quantizers.nearest_codes(rows, codebook)  # [N]
        quantized = quantizers.lookup(codes, codebook).reshape(latents.shape)

        has_codebook = step >= self.seed_step
        decoded = model.decode_latents(
            jnp.where(has_codebook, quantizers.straight_through(latents, quantized), latents)
        )
        terms = {
            "l1": losses.l1(decoded, images),
            "l2": losses.l2(decoded, images),
            "gradient": losses.gradient_l1(decoded, images),
            "commitment": jnp.where(has_codebook, losses.commitment(latents, quantized), 0.0),
        }
        total = sum(getattr(self.loss, name) * term for name, term in terms.items())
        counts = quantizers.histogram(codes, self.config.codebook_size)
        metrics = {f"loss/{name}": term for name, term in terms.items()} | {
            "psnr": statistics.psnr(decoded, images).mean(),
            "codebook_usage": quantizers.usage(counts),
            "codebook_perplexity": statistics.perplexity(counts),
        }
        return total, ({"codebook": codebook, "latents": rows, "codes": codes}, metrics)

    def _learn_codebook(
        self, seen: Params, averages: Params, step: jax.Array, rng: jax.Array
    ) -> tuple[Params, jax.Array]:
        """Nothing moves before the seeding; at it, the averages start over from the seeded codebook."""
        start = quantizers.init_moving_averages(seen["codebook"])
        averages = jax.tree.map(lambda new, old: jnp.where(step == self.seed_step, new, old), start, averages)
        return jax.lax.cond(
            step >= self.seed_step,
            lambda: quantizers.update_codebook(
                averages,
                seen["latents"],
                seen["codes"],
                rng,
                decay=self.loss.ema_decay,
                dead_below=self.loss.dead_below,
                l2_normalize=self.config.l2_normalize,
            ),
            lambda: (averages, seen["codebook"]),
        )

    def reconstruct(self, params: Params, images: jax.Array) -> jax.Array:
        """Images uint8 [B, R, R, 3] → codes → images uint8 [B, R, R, 3]."""
        model = self.model(params)
        return to_uint8(model.decode_float(model.encode(to_float(images))))


def to_float(images: jax.Array) -> jax.Array:
    """uint8 [0, 255] → float32 [0, 1], any shape."""
    return images.astype(jnp.float32) / 255.0


def to_uint8(images: jax.Array) -> jax.Array:
    """Floats, clipped to [0, 1] → uint8, rounded, any shape."""
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def _network(params: Params) -> Params:
    """What the optimizer moves: everything but the codebook."""
    return {name: value for name, value in params.items() if name != "codebook"}
