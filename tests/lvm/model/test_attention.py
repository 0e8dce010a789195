import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lvm.common.errors import UserError
from lvm.hardware import sharding
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.model.attention import attend, choose_kernel
from lvm.model.transformer import REMAT_POLICIES


def plain(query, key, value, segment_ids=None):
    """Dense causal attention, written out."""
    group = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", query, key) / np.sqrt(query.shape[-1])
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), value)


def arrays(length, kv_heads, head_dim=8, batch=2, heads=4):
    """Queries, keys, values, weights of a loss, and three segments a row of lengths that no block has."""
    keys = jax.random.split(jax.random.key(0), 4)
    query, weight = (jax.random.normal(k, (batch, length, heads, head_dim)) for k in keys[:2])
    key, value = (jax.random.normal(k, (batch, length, kv_heads, head_dim)) for k in keys[2:])
    ends = np.array([[length // 3, length // 2], [1, length - 1]])[:batch]
    segments = 1 + (np.arange(length) >= ends[..., None]).sum(1)  # [B, T]
    return query, key, value, weight, jnp.asarray(segments, jnp.int32)


def assert_equal(function, length, kv_heads, head_dim, segmented, **shapes):
    """`function` gives the results and the gradients of plain attention."""
    query, key, value, weight, segments = arrays(length, kv_heads, head_dim, **shapes)
    segments = segments if segmented else None

    def run(attention):
        loss = lambda *qkv: jnp.sum(attention(*qkv, segments) * weight)  # noqa: E731
        return attention(query, key, value, segments), *jax.grad(loss, (0, 1, 2))(query, key, value)

    for ours, wanted in zip(jax.jit(run, static_argnums=0)(function), run(plain), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-5)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("length", [1, 100, 128, 300])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blocks_equal_dense_attention_forward_and_backward(length, kv_heads, segmented):
    assert_equal(lambda *args: attend(*args[:3], "xla", args[3]), length, kv_heads, 8, segmented)


@pytest.mark.parametrize(
    ("length", "kv_heads", "head_dim", "segmented"),
    [(128, 2, 128, False), (200, 1, 100, True), (600, 2, 8, True)],  # 600: two blocks; 100: 3b's heads
)
def test_splash_equals_dense_attention_forward_and_backward(length, kv_heads, head_dim, segmented):
    run = lambda *args: attend(*args[:3], "splash", args[3], interpret=True)  # noqa: E731
    assert_equal(run, length, kv_heads, head_dim, segmented, heads=2, batch=1)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
    ("config", "kv_heads"),
    [
        (MeshConfig(data=2, sequence=4), 8),
        (MeshConfig(data=1, fsdp=2, sequence=2, tensor=2), 4),
        (MeshConfig(data=1, sequence=8), 2),  # fewer key-value heads than devices
        (MeshConfig(data=2, sequence=2, tensor=2), 2),
    ],
)
def test_a_split_sequence_changes_nothing(config, kv_heads, segmented):
    mesh = make_mesh(config)

    def run(query, key, value, segments):
        # Placed on the mesh, as a step's arrays are.
        placed = [
            jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))
            for x in (query, key, value)
        ]
        with sharding.use_mesh(mesh):
            return attend(*placed, "xla", segments)

    assert_equal(run, 24, kv_heads, 4, segmented, heads=8)


def test_heads_that_a_split_sequence_does_not_divide_are_refused():
    query, key, value, _, _ = arrays(8, 4)
    with (
        sharding.use_mesh(make_mesh(MeshConfig(data=1, sequence=4, tensor=2))),
        pytest.raises(UserError, match="sequence × tensor = 4 × 2 doesn't divide 4 heads"),
    ):
        attend(query, key, value, "xla")


def count(jaxpr, name):
    """How often an operation stands in a program, with all that it calls."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += count(inner, name) if hasattr(inner, "eqns") else 0
    return found


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=4, sequence=2)])
@pytest.mark.parametrize(("policy", "runs"), [("none", 1), ("dots", 1), ("attention", 1), ("full", 2)])
def test_only_full_remat_runs_cudnn_a_second_time(policy, runs, mesh, monkeypatch):
    # Traced as if cuDNN were there; running it takes a GPU.
    internal = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(internal, "check_cudnn_version", lambda: 91000)
    run = jax.checkpoint(lambda x: attend(x * 2, x * 3, x * 4, "cudnn") * 5, policy=REMAT_POLICIES[policy])
    gradient = jax.grad(lambda x: jnp.sum(run(x).astype(jnp.float32)))
    with sharding.use_mesh(mesh and make_mesh(mesh)):
        program = jax.make_jaxpr(gradient)(jnp.zeros((4, 128, 2, 100), jnp.bfloat16)).jaxpr
    assert count(program, "dot_product_attention_fwd_wrapper") == runs


def test_cudnn_sees_padded_heads_and_the_true_scale(monkeypatch):
    seen = {}

    def record(query, key, value, **options):
        seen.update(options, shapes=[x.shape for x in (query, key, value)])
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    query, key, value, _, _ = arrays(16, 2, head_dim=100)
    out = attend(query, key, value, "cudnn")
    np.testing.assert_array_equal(out, query)  # what was padded is cut off again
    assert seen["shapes"] == [(2, 16, 4, 104), (2, 16, 2, 104), (2, 16, 2, 104)]
    assert seen["scale"] == pytest.approx(0.1)
    assert (seen["is_causal"], seen["implementation"]) == (True, "cudnn")


def test_the_kernel_is_chosen_by_platform_and_what_cannot_run_is_an_error():
    assert choose_kernel("auto", "cpu", "bfloat16") == "xla"
    assert choose_kernel("auto", "gpu", "bfloat16") == "cudnn"
    assert choose_kernel("auto", "gpu", "float32") == "xla"
    assert choose_kernel("auto", "tpu", "bfloat16") == "splash"
    assert choose_kernel("auto", "tpu", "bfloat16", segmented=True) == "splash"
    with pytest.raises(UserError, match="splash needs a TPU, this is gpu"):
        choose_kernel("splash", "gpu", "bfloat16")
    with pytest.raises(UserError, match="cudnn can't keep the sentences of a row apart"):
        choose_kernel("auto", "gpu", "bfloat16", segmented=True)
    with pytest.raises(UserError, match="cudnn takes heads of up to 128, these have 160"):
        choose_kernel("auto", "gpu", "bfloat16", head_dim=160)
    with pytest.raises(UserError, match="cudnn needs a GPU, this is cpu"):
        choose_kernel("cudnn", "cpu", "bfloat16")
    with pytest.raises(UserError, match="cudnn computes in bfloat16, dtype is float32"):
        choose_kernel("cudnn", "gpu", "float32")
    with pytest.raises(UserError, match="'flash' is not one of"):
        choose_kernel("flash", "cpu", "float32")
