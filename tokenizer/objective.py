"""Tokenizer training as a task of the loop (`lvm.training.task.TrainTask`).

The network trains as a plain autoencoder first; then the codebook is seeded from encoder outputs, and quantization
begins. A discriminator may join later (`tokenizer.adversary`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from lvm.common import statistics
from lvm.common.validation import check_non_negative
from lvm.model import nnx_utils
from lvm.model.nnx_utils import Params
from lvm.training.task import Batch, Metrics, State, apply_if_finite, init_skip_counts
from tokenizer import code_usage
from tokenizer.adversary import Adversary
from tokenizer.losses import pixels
from tokenizer.losses.ssim import WINDOW, ssim
from tokenizer.network import VQGAN, VQGANConfig, quantizer_params
from tokenizer.perceptual.base import NoPerceptual, Perceptual

_PICTURE_COLUMNS = 4  # images per stream in the picture of reconstructions


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms of reconstructed images; those of the quantizer's terms are its own fields."""

    l1: float = 1.0
    l2: float = 4.0
    gradient: float = 0.5
    perceptual: Perceptual = dataclasses.field(default_factory=NoPerceptual)
    autoencoder_steps: int = 10_000  # before the codebook is seeded

    def __post_init__(self) -> None:
        check_non_negative(self, "l1", "l2", "gradient", "autoencoder_steps")


class Forward(NamedTuple):
    """Results of a forward pass besides the images.

    Attributes:
      quantizer: the quantizer's parameters, seeded at the seed step.
      latents: constants.
      features: input of the decoder's last convolution.
      terms: of the quantizer's loss.
    """

    quantizer: Params
    latents: Float[Array, "N C"]
    codes: Int[Array, " N"]
    features: Float[Array, "B _ _ F"]
    terms: Metrics
    statistics: Metrics


class TokenizerTask:
    """A tokenizer with its objective and optimizer.

    The state is {"step": int32, "params": …, "training": {"optimizer", "quantizer", "usage", "skipped", "perceptual"}};
    "params", codebook included, is all that inference needs. With `ema_decay` it holds the moving averages of the
    trained parameters, which are then in training["generator"]; with an adversary there is training["discriminator"].

    Args:
      optimizer: of the trained parameters.
      schedule: step → learning rate, for the metrics.
      has_codebook: the initial weights have a codebook, so it is never seeded.
      heldout: images of each stream for `evaluate` and `pictures`.
      adversary: trained against the decoder.
      ema_decay: of the moving averages that are evaluated and exported; 0 for none. They begin at the seed step, and
        after n more have a decay of at most (1 + n) / (10 + n).
      train: "all", or "decoder": encoder and quantizer, and so the codes, keep their bits.
    """

    def __init__(
        self, config: VQGANConfig, loss: LossConfig, optimizer: optax.GradientTransformation,
        schedule: Callable[[jax.Array], jax.Array], *, batch_size: int, has_codebook: bool = False,
        heldout: Mapping[str, UInt8[np.ndarray, "_ R R 3"]] | None = None, adversary: Adversary | None = None,
        ema_decay: float = 0.0, train: str = "all",
    ):  # fmt: skip
        self.adversary, self.ema_decay, self.train = adversary, ema_decay, train
        self.config, self.loss, self.optimizer, self.schedule = config, loss, optimizer, schedule
        self.quantizer = config.quantizer
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
            "optimizer": self.optimizer.init(self._trained(params)),
            "quantizer": self.quantizer.init_state(quantizer_params(params)),
            "usage": code_usage.init_window(self.config.codebook_size),
            "skipped": init_skip_counts(),
            "perceptual": self.loss.perceptual.init(),
        }
        if self.ema_decay:
            training["generator"] = jax.tree.map(jnp.copy, params)
        if self.adversary:
            training["discriminator"] = self.adversary.init(jax.random.fold_in(rng, 1))
        return {"step": jnp.zeros((), jnp.int32), "params": params, "training": training}

    @property
    def last_phase(self) -> int:
        """See `PhasedTask.last_phase`: 1 with a discriminator."""
        return int(self.adversary is not None)

    def phase(self, step: int) -> int:
        """See `PhasedTask.phase`: 1 from the discriminator's first step on."""
        return int(self.adversary is not None and step >= self.adversary.config.start_step)

    def update(self, state: State, batch: Batch, rng: jax.Array) -> tuple[State, Metrics]:
        """Makes one step of network, codebook and discriminator; a non-finite gradient of any changes nothing."""
        if not self.adversary:
            return self.update_in(0, state, batch, rng)
        has_begun = state["step"] >= self.adversary.config.start_step
        branches = (functools.partial(self.update_in, phase) for phase in (1, 0))
        return jax.lax.cond(has_begun, *branches, state, batch, rng)

    def update_in(self, phase: int, state: State, batch: Batch, rng: jax.Array) -> tuple[State, Metrics]:
        """See `PhasedTask.update_in`: `update` in a program without the discriminator, or always with it."""
        step, training = state["step"], state["training"]
        params = training["generator"] if self.ema_decay else state["params"]
        trained, images = self._trained(params), to_float(batch["images"])
        seed_rng, reset_rng = jax.random.split(rng)
        (decoded, penalty), pull_back, forward = jax.vjp(
            lambda trained: self._forward(params | trained, images, step, seed_rng), trained, has_aux=True
        )
        of_images = jax.value_and_grad(self._reconstruction_loss, has_aux=True)
        (loss, terms), image_gradient = of_images(decoded, images, training["perceptual"])
        adversarial_gradient, discriminator, adversarial = self._adversarial(
            phase, params, training, decoded, images, image_gradient, forward.features
        )
        (gradients,) = pull_back((image_gradient + adversarial_gradient, jnp.ones_like(penalty)))
        updates, optimizer_state = self.optimizer.update(gradients, training["optimizer"], trained)
        new_params = params | forward.quantizer
        new_params |= optax.apply_updates(self._trained(new_params), updates)
        quantizer, quantizer_state = self._update_quantizer(new_params, training["quantizer"], forward, step, reset_rng)
        new = {"optimizer": optimizer_state, "quantizer": quantizer_state, **discriminator}
        new |= self._average(state["params"], new_params | quantizer, step)
        old = {name: training[name] for name in new if name != "params"} | {"params": state["params"]}
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(grad_norm)
        for name in ("loss", "grad_norm"):  # a rectifier's gradient is finite where its argument isn't
            finite &= jnp.isfinite(adversarial.get(f"discriminator/{name}", 0.0))
        new, skipped = apply_if_finite(finite, new, old, training["skipped"])
        usage = self._update_usage(training["usage"], forward.codes, step)
        metrics = {
            # Without the adversarial terms, whose beginning a spike detector would take for a spike.
            "loss": loss + penalty,
            **{f"loss/{name}": term for name, term in (terms | forward.terms).items()},
            **adversarial,
            **forward.statistics,
            **code_usage.window_metrics(usage),
            "psnr": statistics.psnr(decoded, images).mean(),
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(self._trained(new.get("generator", new["params"]))),
            "learning_rate": jnp.asarray(self.schedule(step), jnp.float32),
            **skipped,
        }
        params = new.pop("params")
        training = training | new | {"usage": usage, "skipped": skipped}
        return {"step": step + 1, "params": params, "training": training}, metrics

    def _trained(self, params: Params) -> Params:
        """The parameters that the optimizer updates."""
        if self.train == "decoder":
            return {name: params[name] for name in ("decoder", "post_quant_conv") if name in params}
        constant = quantizer_params(params).keys() - set(self.quantizer.trained)
        return {name: value for name, value in params.items() if name not in constant}

    def _average(self, averages: Params, params: Params, step: jax.Array) -> Params:
        """The parameters to export and, if they are averages, those to train on."""
        if not self.ema_decay:
            return {"params": params}
        n = jnp.maximum(step - self.seed_step, 0).astype(jnp.float32)
        decay = jnp.where(n == 0, 0.0, jnp.minimum(self.ema_decay, (1 + n) / (10 + n)))
        # Equal parameters keep their bits, -0.0 too.
        averages = jax.tree.map(
            lambda old, new: jnp.where((n == 0) | (new == old), new, old + (1 - decay) * (new - old)), averages, params
        )
        return {"params": averages, "generator": params}

    def _adversarial(
        self, phase: int, params: Params, training: Params, decoded: Float[Array, "B R R 3"],
        images: Float[Array, "B R R 3"], image_gradient: Float[Array, "B R R 3"], features: Float[Array, "B _ _ F"],
    ) -> tuple[Float[Array, "B R R 3"], Params, Metrics]:  # fmt: skip
        """Gradient of the adversarial losses by the images, the discriminator after its step, and metrics.

        In phase 0 nothing of the discriminator is computed; gradient and metrics are 0.
        """
        if not self.adversary:
            return jnp.zeros_like(decoded), {}, {}
        adversary, old = self.adversary, training["discriminator"]

        def gradient_norm(gradient: jax.Array) -> jax.Array:
            conv_out = params["decoder"]["conv_out"]

            def images_of(conv_out: Params) -> jax.Array:
                return self.model(params | {"decoder": params["decoder"] | {"conv_out": conv_out}}).to_images(features)

            (of_weights,) = jax.vjp(images_of, conv_out)[1](gradient)
            return optax.tree.norm(of_weights["kernel"])

        def play() -> tuple[jax.Array, Params, Metrics]:
            gradient, metrics = adversary.generator_gradient(old, decoded, images, image_gradient, gradient_norm)
            new, of_discriminator = adversary.update(old, decoded, images)
            return gradient, new, metrics | of_discriminator

        if phase == 0:
            _, _, shapes = jax.eval_shape(play)
            zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
            return jnp.zeros_like(decoded), {"discriminator": old}, zeros
        gradient, new, metrics = play()
        return gradient, {"discriminator": new}, metrics

    def _forward(
        self, params: Params, images: Float[Array, "B R R 3"], step: jax.Array, rng: jax.Array
    ) -> tuple[tuple[Float[Array, "B R R 3"], Float[Array, ""]], Forward]:
        """Reconstructed images, and the weighted sum of the quantizer's loss terms."""
        model, quantizer = self.model(params), self.quantizer
        latents = model.encode_latents(images)  # [B, h, w, C]
        rows = jax.lax.stop_gradient(latents.reshape(-1, latents.shape[-1]))  # [N, C]
        codebook = quantizer_params(params)
        seeded = jax.lax.cond(step == self.seed_step, lambda: quantizer.seed(codebook, rows, rng), lambda: codebook)
        # The value of the seeded parameters, and at any step the gradient of the parameters themselves.
        codebook = jax.tree.map(
            lambda x, y: jax.lax.stop_gradient(x) + (y - jax.lax.stop_gradient(y)), seeded, codebook
        )
        quantized = quantizer.quantize(codebook, latents)

        has_codebook = step >= self.seed_step
        features = model.decoder_features(jnp.where(has_codebook, quantized.vectors, latents))
        terms = {name: jnp.where(has_codebook, term, 0.0) for name, term in quantized.losses.items()}
        penalty = sum((getattr(quantizer, name) * term for name, term in terms.items()), start=jnp.zeros(()))
        codes = quantized.codes.reshape(-1)
        aux = Forward(seeded, rows, codes, features, terms, quantized.statistics)
        return (model.to_images(features), penalty), aux

    def _reconstruction_loss(
        self, decoded: Float[Array, "B R R 3"], images: Float[Array, "B R R 3"], perceptual_params: Params
    ) -> tuple[Float[Array, ""], Metrics]:
        terms = {
            "l1": pixels.l1(decoded, images),
            "l2": pixels.l2(decoded, images),
            "gradient": pixels.gradient_l1(decoded, images),
        }
        total = sum((getattr(self.loss, name) * term for name, term in terms.items()), start=jnp.zeros(()))
        perceptual = self.loss.perceptual
        if perceptual.weight:
            terms[perceptual.kind] = perceptual.distance(perceptual_params, decoded, images, self.config.compute_dtype)
            total += perceptual.weight * terms[perceptual.kind]
        return total, terms

    def _update_quantizer(
        self, params: Params, state: Params, forward: Forward, step: jax.Array, rng: jax.Array
    ) -> tuple[Params, Params]:
        """Updates the quantizer from the seed step on, where its state restarts from the seeded parameters."""
        if self.train == "decoder":
            return quantizer_params(params), state
        initial = self.quantizer.init_state(forward.quantizer)
        state = jax.tree.map(lambda a, b: jnp.where(step == self.seed_step, a, b), initial, state)
        params = quantizer_params(params)
        return jax.lax.cond(
            step >= self.seed_step,
            lambda: self.quantizer.update(params, state, forward.latents, forward.codes, rng),
            lambda: (params, state),
        )

    def _update_usage(self, window: Params, codes: Int[Array, " N"], step: jax.Array) -> Params:
        return jax.lax.cond(
            step >= self.seed_step, lambda: code_usage.update_window(window, codes, step), lambda: window
        )

    def reconstruct(self, params: Params, images: UInt8[Array, "B R R 3"]) -> UInt8[Array, "B R R 3"]:
        """Encodes images to codes and decodes them."""
        model = self.model(params)
        return to_uint8(model.decode_float(model.encode(to_float(images))))

    def evaluate(self, state: State, stopping: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """See `TrainTask.evaluate`: `heldout_psnr/STREAM` (dB) and `heldout_ssim/STREAM` of held-out images.

        SSIM is left out at resolutions below its window.
        """
        metrics: dict[str, float] = {}
        for stream, images in self.heldout.items():
            if stopping():
                return {}
            reconstructed = np.asarray(self._jitted_reconstruct(state["params"], images))
            metrics[f"heldout_psnr/{stream}"] = float(statistics.psnr(reconstructed, images).mean())
            if images.shape[1] >= WINDOW:
                pairs = zip(reconstructed[:, None], images[:, None], strict=True)  # one by one, in little memory
                metrics[f"heldout_ssim/{stream}"] = float(np.mean([_ssim(*pair) for pair in pairs]))
        return metrics

    def pictures(self, state: State) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """See `TrainTask.pictures`: rows of held-out images, reconstructions and absolute differences ×4 per stream."""
        rows = []
        for images in self.heldout.values():
            selected = images[:: max(1, len(images) // _PICTURE_COLUMNS)][:_PICTURE_COLUMNS]
            padded = np.zeros((_PICTURE_COLUMNS, *images.shape[1:]), np.uint8)
            padded[: len(selected)] = selected
            reconstructed = np.asarray(self._jitted_reconstruct(state["params"], padded))
            difference = np.clip(4 * np.abs(reconstructed.astype(int) - padded), 0, 255).astype(np.uint8)
            rows += [np.concatenate([*batch], 1) for batch in (padded, reconstructed, difference)]
        return {"reconstructions": np.concatenate(rows)} if rows else {}


@jax.jit
def _ssim(images: UInt8[Array, "B R R 3"], targets: UInt8[Array, "B R R 3"]) -> Float[Array, " B"]:
    return ssim(to_float(images), to_float(targets))


def to_float(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Maps [0, 255] to float32 [0, 1]."""
    return images.astype(jnp.float32) / 255.0


def to_uint8(images: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Clips to [0, 1] and maps to [0, 255], rounded."""
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)
