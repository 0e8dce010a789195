"""The adversarial phase of the tokenizer's task: gradients, start, averages, frozen codes, settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lvm.common.errors import UserError
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.training.optimizer import OptimizerConfig
from lvm.training.step import Step
from tokenizer.adversary import AdversarialConfig, Adversary
from tokenizer.discriminators.blur_pool import BlurPool
from tokenizer.discriminators.patchgan import PatchGAN
from tokenizer.losses import adversarial as losses
from tokenizer.network import VQGANConfig
from tokenizer.objective import LossConfig, TokenizerTask, to_float
from tokenizer.perceptual.base import MultiScaleSSIM
from tokenizer.quantizers.vq import VQ

MODEL = VQGANConfig(
    resolution=16, patch_size=4, channels=8, channel_multipliers=(1,), encoder_blocks=1, decoder_blocks=1,
    middle_blocks=0, codebook_size=16, codebook_dim=4, norm_groups=4, quantizer=VQ(learning="gradient", dead_below=0.0),
)  # fmt: skip
ADVERSARIAL = AdversarialConfig(
    weight=0.3, adaptive=True, start_step=2, feature_matching=0.2, lecam=0.1, lecam_decay=0.5, r1=0.5,
    objective="non_saturating", discriminator=BlurPool(channels=4, stages=1, norm_groups=2),
    optimizer=OptimizerConfig(schedule="constant", end_learning_rate=3e-5, warmup_steps=0),
)  # fmt: skip
LEARNING_RATE, EMA_DECAY = 0.05, 0.75
LOSS = LossConfig(autoencoder_steps=1, perceptual=MultiScaleSSIM())


def make_task(**options):
    schedule = optax.constant_schedule(LEARNING_RATE)
    adversary = Adversary(ADVERSARIAL, "float32", 100)
    options = {"adversary": adversary, "ema_decay": EMA_DECAY, **options}
    return TokenizerTask(MODEL, LOSS, optax.sgd(schedule), schedule, batch_size=4, **options)


@functools.cache
def history():
    """A task and its compiled last phase, states before each of six steps and after, and the metrics of each."""
    task = make_task()
    updates = [jax.jit(functools.partial(task.update_in, phase)) for phase in range(task.last_phase + 1)]
    states, metrics = [task.init(jax.random.key(0))], []
    for step in range(6):
        state, values = updates[task.phase(step)](states[-1], batch(step), rng(step))
        states.append(state)
        metrics.append({name: float(value) for name, value in values.items()})
    return task, updates[-1], states, metrics


def rng(step):
    return jax.random.fold_in(jax.random.key(1), step)


def batch(seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (4, 4, 4, 3), dtype=np.uint8)
    return {"images": jnp.asarray(images.repeat(4, 1).repeat(4, 2))}


@pytest.mark.slow  # it compiles a second program
def test_generator_step_follows_the_gradient_of_the_whole_loss():
    task, _, states, metrics = history()
    step, (before, after) = 3, states[3:5]
    params, images = before["training"]["generator"], to_float(batch(step)["images"])
    discriminator = before["training"]["discriminator"]["params"]

    def terms(params):
        (decoded, penalty), _ = task._forward(params, images, jnp.int32(step), jax.random.key(0))
        others, _ = task._reconstruction_loss(decoded, images, {})
        logits, fake = task.adversary.judge(discriminator, decoded)
        _, real = task.adversary.judge(discriminator, images)
        adversarial, matching = losses.non_saturating_generator(logits), losses.feature_matching(real, fake)
        return {"others": others, "penalty": penalty, "adversarial": adversarial, "matching": matching}

    gradients = jax.jit(jax.jacrev(terms))(params)
    at_last = {name: np.asarray(tree["decoder"]["conv_out"]["kernel"]) for name, tree in gradients.items()}
    ratio = np.linalg.norm(at_last["others"]) / (np.linalg.norm(at_last["adversarial"]) + 1e-4)
    np.testing.assert_allclose(metrics[step]["adversarial_weight"], 0.3 * ratio, rtol=1e-4)
    weights = {"others": 1.0, "penalty": 1.0, "adversarial": 0.3 * ratio, "matching": 0.2}
    total = jax.tree.map(lambda *x: sum(w * g for w, g in zip(weights.values(), x, strict=True)),
                         *[gradients[name] for name in weights])  # fmt: skip
    expected = jax.tree.map(lambda x, g: x - LEARNING_RATE * g, params, total)
    actual = after["training"]["generator"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), actual, expected)
    assert np.abs(np.asarray(total["codebook"])).max() > 0


def test_discriminator_begins_at_its_step():
    *_, states, metrics = history()
    start = ADVERSARIAL.start_step
    initial = states[0]["training"]["discriminator"]
    for state in states[: start + 1]:
        jax.tree.map(np.testing.assert_array_equal, state["training"]["discriminator"], initial)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), states[start + 1]["training"]["discriminator"], initial)
    assert all(jax.tree.leaves(moved["params"]["conv_out"]))
    counts = [x for x in jax.tree.leaves(states[-1]["training"]["discriminator"]["optimizer"]) if x.dtype == jnp.int32]
    assert {int(count) for count in counts} == {6 - start}
    names = ["loss", "grad_norm", "logits_real", "logits_fake", "lecam", "r1"]
    for step, values in enumerate(metrics):
        for name in (*[f"discriminator/{name}" for name in names], "loss/adversarial", "loss/feature_matching"):
            assert (values[name] != 0) == (step >= start), (step, name)


def test_program_before_the_start_has_no_discriminator():
    def convolutions(task, index):
        step = Step(task, make_mesh(MeshConfig(), jax.devices()[:1]), seed=0)
        return step.lower(index).as_text().count("stablehlo.convolution")

    start, none = ADVERSARIAL.start_step, convolutions(make_task(adversary=None), 0)
    assert none > 0
    assert [convolutions(make_task(), index) for index in (0, start - 1)] == [none, none]
    later = [convolutions(make_task(), index) for index in (start, start + 9, None)]
    assert len({*later}) == 1
    assert later[0] > none


@pytest.mark.slow
def test_one_program_makes_the_steps_of_both_phases():
    task, _, states, _ = history()
    update = jax.jit(task.update)
    for step in (ADVERSARIAL.start_step - 1, ADVERSARIAL.start_step):
        after, _ = update(states[step], batch(step), rng(step))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
            after["training"],
            states[step + 1]["training"],
        )


def test_averages_of_logits_by_hand():
    *_, states, metrics = history()
    expected = {"real": 0.0, "fake": 0.0}
    for values in metrics[ADVERSARIAL.start_step :]:
        expected = {name: 0.5 * x + 0.5 * values[f"discriminator/logits_{name}"] for name, x in expected.items()}
    averages = states[-1]["training"]["discriminator"]["logits"]
    assert {name: float(x) for name, x in averages.items()} == pytest.approx(expected, rel=1e-4)


def test_exported_params_are_averages_by_hand():
    *_, states, _ = history()
    expected = states[0]["training"]["generator"]
    for step, state in enumerate(states[1:]):
        n = max(step - LOSS.autoencoder_steps, 0)
        decay = min(EMA_DECAY, (1 + n) / (10 + n)) if n else 0.0
        trained = state["training"]["generator"]
        expected = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, expected, trained)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state["params"], expected)
    assert np.abs(states[-1]["params"]["codebook"] - trained["codebook"]).max() > 0


def test_non_finite_gradient_of_the_discriminator_changes_nothing():
    _, update, states, _ = history()
    state = states[3]
    broken = jax.tree.map(jnp.copy, state)
    broken["training"]["discriminator"]["logits"]["fake"] = jnp.float32(jnp.nan)  # reaches LeCam alone
    after, metrics = update(broken, batch(), jax.random.key(0))
    assert metrics["skipped_steps"] == 1
    assert np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after["params"], state["params"])
    for name in ("generator", "optimizer", "quantizer"):
        jax.tree.map(np.testing.assert_array_equal, after["training"][name], state["training"][name])
    unchanged = (after["training"]["discriminator"][name] for name in ("params", "optimizer"))
    expected = (state["training"]["discriminator"][name] for name in ("params", "optimizer"))
    jax.tree.map(np.testing.assert_array_equal, [*unchanged], [*expected])


@pytest.mark.slow
def test_decoder_training_keeps_the_codes():
    task = make_task(train="decoder", has_codebook=True)
    initial = state = task.init(jax.random.key(0))
    update = jax.jit(task.update)
    for step in range(4):
        state, metrics = update(state, batch(step), rng(step))
    for name, tree in initial["params"].items():
        same = jax.tree.map(lambda a, b: np.array_equal(a, b), state["params"][name], tree)
        assert all(jax.tree.leaves(same)) == (name not in ("decoder", "post_quant_conv")), name
    assert metrics["discriminator/grad_norm"] > 0


@pytest.mark.parametrize(
    ("changes", "run", "message"),
    [
        ({}, (4, 16, 2), r"config\.adversarial\.start_step=2 must be below config\.loop\.total_steps=2"),
        ({"discriminator": PatchGAN()}, (1, 256, 9), r"config\.batch_size=1: .* patchgan need at least 2"),
        ({"discriminator": PatchGAN()}, (4, 16, 9), r"config\.model\.resolution=16: .* needs at least 24"),
        ({"weight": 0.0}, (4, 16, 9), r"config\.adversarial\.feature_matching=0\.2 has no discriminator"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, run, message):
    with pytest.raises(UserError, match=f"^{message}"):
        dataclasses.replace(ADVERSARIAL, **changes).check(*run)
