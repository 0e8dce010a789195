"""Tokenizer training as a task of the loop (`lvm.training.task.TrainTask`).

The network trains as a plain autoencoder first; then the codebook is seeded from encoder outputs, and vector
quantization with a straight-through gradient begins. The codebook follows moving averages and gets no gradient.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from lvm.common import statistics
from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative
from lvm.model import nnx_utils
from lvm.model.nnx_utils import Params
from lvm.training.task import Batch, Metrics, State, apply_if_finite, init_skip_counts
from tokenizer import losses, quantizers
from tokenizer.network import VQGAN, VQGANConfig

_PICTURE_COLUMNS = 4  # images per stream in the picture of reconstructions


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms, and codebook learning."""

    l1: float = 1.0
    l2: float = 4.0
    gradient: float = 0.5
    commitment: float = 0.25
    autoencoder_steps: int = 10_000  # before the codebook is seeded
    ema_decay: float = 0.97  # of the codebook's moving averages
    dead_below: float = 0.1  # codes with a lower average count per batch are replaced

    def __post_init__(self) -> None:
        check_non_negative(self, "l1", "l2", "gradient", "commitment", "autoencoder_steps", "dead_below")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must be in [0, 1)")


class TokenizerTask:
    """A tokenizer with its objective and optimizer.

    The state is {"step": int32, "params": …, "training": {"optimizer": …, "averages": …, "skipped": …}}; "params",
    codebook included, is all that inference needs.

    Args:
      optimizer: of everything but the codebook.
      schedule: step → learning rate, for the metrics.
      has_codebook: the initial weights have a codebook, so it is never seeded.
      heldout: images of each stream for `evaluate` and `pictures`.
    """

    def __init__(
        self, config: VQGANConfig, loss: LossConfig, optimizer: optax.GradientTransformation,
        schedule: Callable[[jax.Array], jax.Array], *, batch_size: int, has_codebook: bool = False,
        heldout: Mapping[str, UInt8[np.ndarray, "_ R R 3"]] | None = None,
    ):  # fmt: skip
        self.config, self.loss, self.optimizer, self.schedule = config, loss, optimizer, schedule
        self.seed_step = -1 if has_codebook else loss.autoencoder_steps
        self.batch_size, self.heldout = batch_size, heldout or {}
        self._make_model = lambda rngs: VQGAN(config, rngs)
        self.graphdef, _ = nnx_utils.abstract_module(self._make_model)
        self.logical_axes = nnx_utils.logical_axes(self._make_model)
        self._jitted_reconstruct = jax.jit(self.reconstruct)

    def model(self, params: Params) -> VQGAN:
        """The network with `params`; works under jit."""
        return nnx_utils.merge(self.graphdef, params)

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `TrainTask.batch_spec`: `images` uint8 [B, R, R, 3]."""
        R = self.config.resolution
        return {"images": jax.ShapeDtypeStruct((self.batch_size, R, R, 3), jnp.uint8)}

    def init(self, rng: jax.Array) -> State:
        """Returns a fresh state, a pure function of `rng`."""
        params = nnx_utils.init_params(self._make_model, rng)
        training = {
            "optimizer": self.optimizer.init(_network(params)),
            "averages": quantizers.init_moving_averages(params["codebook"]),
            "skipped": init_skip_counts(),
        }
        return {"step": jnp.zeros((), jnp.int32), "params": params, "training": training}

    def update(self, state: State, batch: Batch, rng: jax.Array) -> tuple[State, Metrics]:
        """Makes one optimizer step and one codebook update; a non-finite gradient changes nothing."""
        step, params, training = state["step"], state["params"], state["training"]
        network, images = _network(params), to_float(batch["images"])
        seed_rng, reset_rng = jax.random.split(rng)
        gradient = jax.value_and_grad(self._loss, has_aux=True)
        (loss, (quantized, metrics)), gradients = gradient(network, params["codebook"], images, step, seed_rng)
        updates, optimizer_state = self.optimizer.update(gradients, training["optimizer"], network)
        averages, codebook = self._update_codebook(quantized, training["averages"], step, reset_rng)
        grad_norm = optax.tree.norm(gradients)
        old = {"params": params, "optimizer": training["optimizer"], "averages": training["averages"]}
        new_params = optax.apply_updates(network, updates) | {"codebook": codebook}
        new = {"params": new_params, "optimizer": optimizer_state, "averages": averages}
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
        self, network: Params, codebook: Float[Array, "K C"], images: Float[Array, "B R R 3"],
        step: jax.Array, rng: jax.Array,
    ) -> tuple[Float[Array, ""], tuple[Params, Metrics]]:  # fmt: skip
        """The loss, and what the codebook update needs: the (seeded) codebook, latents and codes."""
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
        straight_through = quantizers.straight_through(latents, quantized)
        decoded = model.decode_latents(jnp.where(has_codebook, straight_through, latents))
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

    def _update_codebook(
        self, quantized: Params, averages: Params, step: jax.Array, rng: jax.Array
    ) -> tuple[Params, Float[Array, "K C"]]:
        """Moves averages and codebook from the seed step on, where the averages restart from the seeded codebook."""
        initial = quantizers.init_moving_averages(quantized["codebook"])
        averages = jax.tree.map(lambda a, b: jnp.where(step == self.seed_step, a, b), initial, averages)
        decay, dead_below = self.loss.ema_decay, self.loss.dead_below
        l2_normalize, arguments = self.config.l2_normalize, (quantized["latents"], quantized["codes"], rng)
        return jax.lax.cond(
            step >= self.seed_step,
            lambda: quantizers.update_codebook(
                averages, *arguments, decay=decay, dead_below=dead_below, l2_normalize=l2_normalize
            ),
            lambda: (averages, quantized["codebook"]),
        )

    def reconstruct(self, params: Params, images: UInt8[Array, "B R R 3"]) -> UInt8[Array, "B R R 3"]:
        """Encodes images to codes and decodes them."""
        model = self.model(params)
        return to_uint8(model.decode_float(model.encode(to_float(images))))

    def evaluate(self, state: State, stopping: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """See `TrainTask.evaluate`: PSNR in dB of each stream's held-out images, `heldout_psnr/STREAM`."""
        metrics: dict[str, float] = {}
        for stream, images in self.heldout.items():
            if stopping():
                return {}
            psnr = statistics.psnr(np.asarray(self._jitted_reconstruct(state["params"], images)), images)  # [n]
            metrics[f"heldout_psnr/{stream}"] = float(psnr.mean())
        return metrics

    def pictures(self, state: State) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """See `TrainTask.pictures`: held-out images above their reconstructions, a pair of rows per stream."""
        rows = []
        for images in self.heldout.values():
            selected = images[:: max(1, len(images) // _PICTURE_COLUMNS)][:_PICTURE_COLUMNS]
            padded = np.zeros((_PICTURE_COLUMNS, *images.shape[1:]), np.uint8)
            padded[: len(selected)] = selected
            reconstructed = self._jitted_reconstruct(state["params"], padded)
            rows += [np.concatenate([*np.asarray(batch)], 1) for batch in (padded, reconstructed)]
        return {"reconstructions": np.concatenate(rows)} if rows else {}


def to_float(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Maps [0, 255] to float32 [0, 1]."""
    return images.astype(jnp.float32) / 255.0


def to_uint8(images: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Clips to [0, 1] and maps to [0, 255], rounded."""
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def _network(params: Params) -> Params:
    """Everything but the codebook: what the optimizer updates."""
    return {name: value for name, value in params.items() if name != "codebook"}
