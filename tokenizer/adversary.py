"""The adversary of a tokenizer: a discriminator with its losses, optimizer and state."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lvm.common.errors import UserError
from lvm.common.validation import check_choice, check_non_negative
from lvm.model import nnx_utils
from lvm.model.nnx_utils import Params
from lvm.training import optimizer
from lvm.training.optimizer import OptimizerConfig
from lvm.training.task import Metrics
from tokenizer.discriminators.base import Discriminator, Judgment
from tokenizer.discriminators.blur_pool import BlurPool
from tokenizer.losses import adversarial as losses

Images = Float[Array, "B R R 3"]


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    """A discriminator, its losses and optimizer; none if `weight` is 0.

    Attributes:
      weight: of the generator's adversarial loss.
      adaptive: multiplies `weight` by the ratio of the gradient norms of all other losses of the image and of the
        adversarial one, at the decoder's last convolution.
      start_step: the first step with a discriminator; the schedule of its optimizer begins there.
      objective: "hinge" or "non_saturating".
      feature_matching: weight of the generator's loss between the discriminator's features of both images.
      lecam: weight of LeCam regularization of the discriminator.
      lecam_decay: of its moving averages of logits.
      r1: weight of R1 regularization of the discriminator.
    """

    weight: float = 0.0
    adaptive: bool = False
    start_step: int = 20_000
    objective: str = "hinge"
    feature_matching: float = 0.0
    lecam: float = 0.0
    lecam_decay: float = 0.999
    r1: float = 0.0
    discriminator: Discriminator = dataclasses.field(default_factory=BlurPool)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        check_non_negative(self, "weight", "start_step", "feature_matching", "lecam", "r1")
        check_choice(self, "objective", tuple(losses.OBJECTIVES))
        if not 0 <= self.lecam_decay < 1:
            raise UserError(f"lecam_decay={self.lecam_decay} must be in [0, 1)")

    def check(self, batch_size: int, resolution: int, total_steps: int) -> None:
        """Checks the settings against the rest of a run's.

        Raises:
          UserError: naming the settings, from `config` on.
        """
        kind = self.discriminator.kind
        if self.weight == 0:
            if self.feature_matching:
                raise UserError(
                    f"config.adversarial.feature_matching={self.feature_matching} has no discriminator, because "
                    "config.adversarial.weight=0; set a weight"
                )
            return
        if self.start_step >= total_steps:
            raise UserError(
                f"config.adversarial.start_step={self.start_step} must be below config.loop.total_steps={total_steps}, "
                "else the discriminator never starts; without one, set config.adversarial.weight=0"
            )
        if batch_size < self.discriminator.min_batch:
            raise UserError(
                f"config.batch_size={batch_size}: the statistics of discriminator {kind} need at least "
                f"{self.discriminator.min_batch} images"
            )
        if resolution < (smallest := self.discriminator.min_resolution):
            raise UserError(f"config.model.resolution={resolution}: discriminator {kind} needs at least {smallest}")


class Adversary:
    """A discriminator in training; its methods are pure functions of its state.

    The state is {"params", "optimizer", "logits": moving averages of real and fake logits}.

    Args:
      dtype: of the convolutions.
      total_steps: of the run.
    """

    def __init__(self, config: AdversarialConfig, dtype: str, total_steps: int):
        self.config = config
        self._discriminator_loss, self._generator_loss = losses.OBJECTIVES[config.objective]
        self._optimizer, _ = optimizer.build(config.optimizer, total_steps - config.start_step)
        self._build = lambda rngs: config.discriminator.build(dtype, rngs)
        self._graphdef, _ = nnx_utils.abstract_module(self._build)

    def init(self, rng: jax.Array) -> Params:
        """A fresh state."""
        params = nnx_utils.init_params(self._build, rng)
        averages = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
        return {"params": params, "optimizer": self._optimizer.init(params), "logits": averages}

    def judge(self, params: Params, images: Images) -> Judgment:
        """Logits and features of images in [0, 1]."""
        return nnx_utils.merge(self._graphdef, params)(images)

    def generator_gradient(
        self, state: Params, decoded: Images, images: Images, image_gradient: Images,
        gradient_norm: Callable[[Images], Float[Array, ""]],
    ) -> tuple[Images, Metrics]:  # fmt: skip
        """Gradient of the generator's losses by its images, weighted, and the terms.

        Args:
          image_gradient: that of all other losses of the images.
          gradient_norm: norm of the gradient at the decoder's last convolution, given one of the images.
        """
        params, weights = state["params"], self.config
        _, real_features = self.judge(params, images) if weights.feature_matching else (None, [])

        def terms(decoded: Images) -> dict[str, jax.Array]:
            logits, features = self.judge(params, decoded)
            terms = {"adversarial": self._generator_loss(logits)}
            if weights.feature_matching:
                terms["feature_matching"] = losses.feature_matching(real_features, features)
            return terms

        values, pull_back = jax.vjp(terms, decoded)

        def gradient(name: str) -> Images:
            cotangent = {key: jnp.float32(key == name) for key in values}
            return pull_back(cotangent)[0]

        adversarial = gradient("adversarial")
        ratio = jnp.ones(())
        if weights.adaptive:
            ratio = losses.adaptive_weight(gradient_norm(image_gradient), gradient_norm(adversarial))
        total = weights.weight * ratio * adversarial
        if weights.feature_matching:
            total += weights.feature_matching * gradient("feature_matching")
        metrics = {f"loss/{name}": value for name, value in values.items()}
        return total, metrics | {"adversarial_weight": weights.weight * ratio}

    def update(self, state: Params, decoded: Images, images: Images) -> tuple[Params, Metrics]:
        """Makes one step of the discriminator."""
        loss_of = jax.value_and_grad(self._loss, has_aux=True)
        (loss, (averages, terms)), gradients = loss_of(state["params"], state["logits"], decoded, images)
        updates, optimizer_state = self._optimizer.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients), **terms}
        state = {"params": params, "optimizer": optimizer_state, "logits": averages}
        return state, {f"discriminator/{name}": value for name, value in metrics.items()}

    def _loss(
        self, params: Params, averages: Params, decoded: Images, images: Images
    ) -> tuple[Float[Array, ""], tuple[Params, Metrics]]:
        config = self.config
        (real, _), (fake, _) = self.judge(params, images), self.judge(params, decoded)
        loss = self._discriminator_loss(real, fake)
        terms = {"logits_real": real.mean(), "logits_fake": fake.mean()}
        mix = lambda name, x: config.lecam_decay * averages[name] + (1 - config.lecam_decay) * x.mean()  # noqa: E731
        averages = jax.lax.stop_gradient({"real": mix("real", real), "fake": mix("fake", fake)})
        if config.lecam:
            terms["lecam"] = losses.lecam(real, fake, averages["real"], averages["fake"])
            loss += config.lecam * terms["lecam"]
        if config.r1:
            terms["r1"] = losses.r1(lambda x: self.judge(params, x)[0], images)
            loss += config.r1 * terms["r1"]
        return loss, (averages, terms)
