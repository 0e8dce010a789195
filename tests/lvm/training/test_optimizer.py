"""Schedules, updates of each optimizer, and shapes and shardings of its state."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from optax import contrib

from lvm.common.errors import UserError
from lvm.hardware import sharding
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.model.nnx_utils import abstract_module, count_params, init_params, logical_axes, merge
from lvm.model.transformer import SIZES, ModelConfig, Transformer
from lvm.training import optimizer
from lvm.training.optimizer import OptimizerConfig

CONFIG = OptimizerConfig(learning_rate=0.1, end_learning_rate=0.01, warmup_steps=10, clip_norm=0.0)
AT_ONCE = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0, clip_norm=0.0)
NAMES = ("adamw", "lion", "adafactor", "muon")
MODEL = ModelConfig(
    hidden_size=8,
    mlp_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    vocabulary_size=8,
    context=8,
    dtype="float32",
)


def make(rngs, config=MODEL):
    return Transformer(config, rngs)


def name_of(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_name(tree):
    return {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tree)


def run(tx, params, *gradients):
    """Returns the last updates and the state after them; the parameters stay the same."""
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
    return updates, state


def changes(config, params, *gradients):
    return run(optimizer.build(config, 100)[0], params, *gradients)[0]


# Schedules.


def test_cosine_warms_up_and_ends_at_end_learning_rate():
    _, schedule = optimizer.build(CONFIG, 100)
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10)], [0, 0.05, 0.1], rtol=1e-5)
    np.testing.assert_allclose(schedule(55), (0.1 + 0.01) / 2, rtol=1e-5)  # halfway down the cosine
    np.testing.assert_allclose([schedule(100), schedule(1000)], 0.01, rtol=1e-5)


def test_wsd_is_constant_then_linear():
    _, schedule = optimizer.build(dataclasses.replace(CONFIG, schedule="wsd", decay_steps=20), 100)
    np.testing.assert_allclose([schedule(0), schedule(5)], [0, 0.05], rtol=1e-5)
    np.testing.assert_allclose([schedule(10), schedule(50), schedule(80)], 0.1, rtol=1e-5)
    np.testing.assert_allclose([schedule(85), schedule(90)], [0.0775, 0.055], rtol=1e-5)
    np.testing.assert_allclose([schedule(100), schedule(1000)], 0.01, rtol=1e-5)


def test_wsd_may_have_no_constant_phase():
    _, schedule = optimizer.build(dataclasses.replace(CONFIG, schedule="wsd", decay_steps=90), 100)
    np.testing.assert_allclose([schedule(10), schedule(55)], [0.1, 0.055], rtol=1e-5)


def test_constant_stays_at_peak():
    _, schedule = optimizer.build(OptimizerConfig(schedule="constant", learning_rate=0.1, warmup_steps=10), 100)
    np.testing.assert_allclose([schedule(0), schedule(5)], [0, 0.05], rtol=1e-5)
    np.testing.assert_allclose([schedule(10), schedule(100), schedule(1000)], 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": "wsd", "decay_steps": 20}, {"schedule": "constant", "end_learning_rate": 3e-5}],
)
def test_schedule_without_warmup_starts_at_peak(options):
    _, schedule = optimizer.build(dataclasses.replace(CONFIG, warmup_steps=0, **options), 100)
    np.testing.assert_allclose(schedule(0), 0.1, rtol=1e-5)


def test_lengths_in_tokens_round_up_to_steps():
    tokens = {"warmup_steps": 0, "warmup_tokens": 9 * 512 + 1, "decay_tokens": 20 * 512}
    _, schedule = optimizer.build(dataclasses.replace(CONFIG, schedule="wsd", **tokens), 100, 512)
    _, same = optimizer.build(dataclasses.replace(CONFIG, schedule="wsd", decay_steps=20), 100)
    assert [float(schedule(step)) for step in range(102)] == [float(same(step)) for step in range(102)]


# Updates.


@functools.cache
def initial_params():
    return jax.jit(lambda: init_params(make, jax.random.key(0, impl="rbg")))()


@functools.cache
def compiled_loss_and_gradient():
    graphdef, _ = abstract_module(make)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 8, (4, 9)))
    positions = jnp.tile(jnp.arange(8), (4, 1))

    def loss(params):
        logits = merge(graphdef, params)(tokens[:, :-1], positions, "xla")
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(
    ("name", "moment_dtype"),
    [
        *((name, "float32") for name in NAMES),
        ("adamw", "bfloat16"),
        *(
            pytest.param(name, "bfloat16", marks=pytest.mark.slow)
            for name in NAMES
            if name not in ("adamw", "adafactor")
        ),
    ],
)
def test_optimizer_trains_small_transformer(name, moment_dtype):
    config = OptimizerConfig(
        name, learning_rate=1e-2 if name == "lion" else 2e-2, warmup_steps=5, moment_dtype=moment_dtype
    )
    tx, _ = optimizer.build(config, 60)
    params = initial_params()
    state, update = tx.init(params), jax.jit(tx.update)
    losses = []
    for _ in range(60):
        loss, gradients = compiled_loss_and_gradient()(params)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    assert losses[0] > 2 > 1 > losses[-1]  # nats; uniform predictions have log 8 = 2.08


@pytest.mark.parametrize("steps", [1, 3])
def test_adamw_is_bit_identical_to_optax(steps):
    _, params = abstract_module(make)
    params, gradients = random_like(params), [random_like(params, seed) for seed in range(steps)]
    config = dataclasses.replace(CONFIG, clip_norm=1.0)
    _, schedule = optimizer.build(config, 100)
    adamw = optax.adamw(schedule, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=optimizer._decay_mask)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    assert jax.tree.structure(optimizer.build(config, 100)[0].init(params)) == jax.tree.structure(
        tx.init(params)
    )  # so older checkpoints restore
    expected, _ = run(tx, params, *gradients)
    jax.tree.map(np.testing.assert_array_equal, changes(config, params, *gradients), expected)


@pytest.mark.parametrize("decay", ["matrices", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_scales_with_learning_rate(name, decay):
    _, params = abstract_module(make)
    params = random_like(params)
    config = dataclasses.replace(AT_ONCE, name=name, weight_decay=0.5, weight_decay_mask=decay)
    updates = by_name(changes(config, params, jax.tree.map(jnp.zeros_like, params)))
    exempt = {"embedding", "norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale"}
    for path, value in by_name(params).items():
        share = 0.0 if decay == "matrices" and path in exempt else 0.1 * 0.5
        np.testing.assert_allclose(updates[path], -share * value, rtol=1e-5, err_msg=path)


def test_weight_decay_applies_to_matrices_alone():
    names = ("kernel", "scale", "bias", "embedding", "codebook")
    params = {"layer": {name: jnp.ones((2, 2)) for name in names}}
    config = dataclasses.replace(AT_ONCE, weight_decay=0.5)
    updates = changes(config, params, jax.tree.map(jnp.zeros_like, params))["layer"]
    np.testing.assert_allclose(updates.pop("kernel"), -0.1 * 0.5, rtol=1e-5)
    assert all(not np.any(updates[name]) for name in names[1:])


@pytest.mark.parametrize(("clip_norm", "scaled"), [(1.0, 0.1), (20.0, 1.0), (0.0, 1.0)])
def test_gradients_above_clip_norm_are_scaled(clip_norm, scaled):
    # With b1 = b2 = 0 and a large epsilon, Adam's step is all but proportional to the gradient.
    config = dataclasses.replace(AT_ONCE, b1=0.0, b2=0.0, epsilon=1e6, clip_norm=clip_norm)
    updates = changes(config, {"kernel": jnp.zeros(2)}, {"kernel": jnp.array([6.0, 8.0])})
    np.testing.assert_allclose(updates["kernel"], -0.1 * scaled * np.array([6, 8]) / 1e6, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_gets_clipped_gradients(name):
    _, params = abstract_module(make)
    params = {"embedding": params["embedding"], "layers": {"mlp": params["layers"]["mlp"]}, "norm": params["norm"]}
    params, gradients = random_like(params), random_like(params, 1)
    norm = optax.tree.norm(gradients)

    def state_after(clip_norm, gradients):
        tx, _ = optimizer.build(dataclasses.replace(AT_ONCE, name=name, clip_norm=clip_norm), 100)
        return jax.tree.leaves(run(tx, params, gradients)[1])

    expected = state_after(0.0, jax.tree.map(lambda gradient: gradient / norm, gradients))
    for leaf, other in zip(state_after(1.0, gradients), expected, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4)


# Muon.


def as_matrix(name, layer):
    """Reshapes one layer's kernel to the matrix that it multiplies by: inputs × outputs."""
    if name.endswith("/out"):
        return layer.reshape(-1, layer.shape[-1])
    return layer.reshape(layer.shape[0], -1)


def test_muon_of_stacked_kernels_equals_muon_per_layer():
    _, params = abstract_module(make)
    params, gradients = random_like(params), [random_like(params, seed) for seed in (1, 2)]
    config = dataclasses.replace(AT_ONCE, name="muon", b1=0.8)
    updates = by_name(changes(config, params, *gradients))
    _, schedule = optimizer.build(config, 100)
    alone = jax.jit(functools.partial(run, contrib.muon(schedule, beta=0.8, consistent_rms=0.2)))
    kernels = [name for name in updates if name.startswith("layers/") and "norm" not in name]
    assert len(kernels) == 7
    for name in kernels:
        for layer in range(2):
            matrices = [{"kernel": as_matrix(name, by_name(g)[name][layer])} for g in (params, *gradients)]
            expected, _ = alone(*matrices)
            actual = as_matrix(name, updates[name][layer])
            np.testing.assert_allclose(actual, expected["kernel"], rtol=1e-3, atol=1e-5, err_msg=name)


def test_muon_applies_nadamw_to_the_rest():
    _, params = abstract_module(make)
    params, gradients = random_like(params), [random_like(params, seed) for seed in (1, 2)]
    config = dataclasses.replace(AT_ONCE, name="muon", b1=0.8, b2=0.9, epsilon=0.1, weight_decay=0.5)
    updates = by_name(changes(config, params, *gradients))
    _, schedule = optimizer.build(config, 100)
    adamw = optax.nadamw(schedule, 0.8, 0.9, 0.1, weight_decay=0.5, mask=optimizer._decay_mask)
    expected = by_name(run(adamw, params, *gradients)[0])
    for name in ("embedding", "head", "norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale"):
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_muon_updates_have_rms_of_adamw():
    # One learning rate serves both: AdamW's updates have an RMS of 0.2 to 0.4 of it in practice.
    _, params = abstract_module(make)
    updates = by_name(changes(dataclasses.replace(AT_ONCE, name="muon"), random_like(params), random_like(params, 1)))
    for name in ("layers/attention/query", "layers/attention/out", "layers/mlp/up", "layers/mlp/down"):
        assert 0.1 < float(jnp.sqrt(jnp.mean(updates[name] ** 2))) / 0.1 < 0.3


def test_muon_refuses_model_without_layers():
    params = {"encoder": {"kernel": jnp.zeros((3, 3, 4, 4)), "bias": jnp.zeros(4)}}
    tx, _ = optimizer.build(dataclasses.replace(AT_ONCE, name="muon"), 100)
    with pytest.raises(UserError, match=r"^config\.optimizer\.name=muon needs .* has none"):
        tx.init(params)


# State: dtypes, sizes, shardings.


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_moment_dtype_applies_to_first_moment_alone(name, moment_dtype):
    _, params = abstract_module(make)
    tx, _ = optimizer.build(dataclasses.replace(AT_ONCE, name=name, moment_dtype=moment_dtype), 100)
    fresh = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, fresh, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    for state in (fresh, after):
        floats = {name: leaf.dtype for name, leaf in by_name(state).items() if leaf.dtype != jnp.int32}
        first = {name for name in floats if "/mu/" in name}
        assert len(first) == len(jax.tree.leaves(params))
        assert {floats[name] for name in first} == {jnp.dtype(moment_dtype)}
        assert all(dtype == jnp.float32 for name, dtype in floats.items() if name not in first)


@pytest.mark.parametrize("size", ["100m", "3b"])  # of all sizes, the narrowest heads, and an odd width of heads
def test_adafactor_state_is_small(size):
    config = dataclasses.replace(SIZES[size], vocabulary_size=8448)
    _, params = abstract_module(lambda rngs: Transformer(config, rngs))
    tx, _ = optimizer.build(dataclasses.replace(AT_ONCE, name="adafactor"), 100)
    state = jax.eval_shape(tx.init, params)
    assert count_params(state) < 0.03 * count_params(params)
    for name, leaf in by_name(state).items():  # and no moment is shared by layers
        if "/layers/" in name and leaf.size > 1:  # Optax keeps one number where there is nothing to keep
            assert leaf.shape[0] == config.num_layers, name


WIDE = dataclasses.replace(MODEL, hidden_size=128, num_kv_heads=2, mlp_size=192, vocabulary_size=64)
MOMENTS = {  # of each parameter's shape: (of a kernel that Muon moves, of all others)
    "adamw": (2, 2),
    "lion": (1, 1),
    "muon": (1, 2),
}


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_sharded_like_their_parameter(name):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    axes = logical_axes(lambda rngs: make(rngs, WIDE))
    _, params = abstract_module(lambda rngs: make(rngs, WIDE))
    tx, _ = optimizer.build(dataclasses.replace(AT_ONCE, name=name, clip_norm=1.0), 100)
    state = jax.eval_shape(tx.init, params)
    expected, actual = (
        by_name(sharding.shardings(mesh, params, axes)),
        by_name(sharding.shardings(mesh, state, axes)),
    )
    shapes, counts = by_name(params), Counter()
    for path, leaf in by_name(state).items():
        owners = [owner for owner in shapes if path.endswith("/" + owner) and leaf.shape == shapes[owner].shape]
        assert len(owners) <= 1
        for owner in owners:
            assert actual[path] == expected[owner], path
            counts[owner] += 1
        if not owners:
            assert actual[path].spec == PartitionSpec(), path
    if name == "adafactor":  # all else is factored
        assert counts == {owner: 1 for owner in shapes if owner.endswith("scale")}
    else:
        of_matrix, of_others = MOMENTS[name]
        assert counts == {o: of_matrix if o in optimizer._MATRICES else of_others for o in shapes}


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_update_on_mesh_equals_one_device(name):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    axes = {
        "layers": {"attention": {"out": ("layers", "heads", "head_dim", "embed")}},
        "norm": {"scale": ("embed",)},
    }
    params = {"layers": {"attention": {"out": jnp.zeros((2, 2, 64, 64))}}, "norm": {"scale": jnp.zeros(64)}}
    params, gradients = random_like(params), random_like(params, 1)
    tx, _ = optimizer.build(dataclasses.replace(AT_ONCE, name=name, weight_decay=0.5, clip_norm=1.0), 100)
    expected, _ = run(tx, params, gradients)
    put = lambda tree: jax.device_put(tree, sharding.shardings(mesh, tree, axes))  # noqa: E731
    updates, _ = jax.jit(tx.update)(put(gradients), put(tx.init(params)), put(params))
    for path, leaf in by_name(updates).items():
        np.testing.assert_allclose(leaf, by_name(expected)[path], rtol=1e-3, atol=1e-4, err_msg=path)
