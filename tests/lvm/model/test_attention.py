"""Attention kernels against dense attention, on one device and under meshes."""

import functools
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


def dense_attention(query, key, value, segment_ids=None):
    """Reference: dense causal attention."""
    group = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", query, key) / np.sqrt(query.shape[-1])
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), value)


def arrays(length, kv_heads, head_dim=8, batch=2, heads=4):
    """Query, key, value, loss weights, and three segments per row that do not align with blocks."""
    keys = jax.random.split(jax.random.key(0), 4)
    query, weight = (jax.random.normal(k, (batch, length, heads, head_dim)) for k in keys[:2])
    key, value = (jax.random.normal(k, (batch, length, kv_heads, head_dim)) for k in keys[2:])
    ends = np.array([[length // 3, length // 2], [1, length - 1]])[:batch]
    segments = 1 + (np.arange(length) >= ends[..., None]).sum(1)  # [B, T]
    return query, key, value, weight, jnp.asarray(segments, jnp.int32)


def with_and_without_segments(cases, quick):
    """Each case with segments and without; all but those of `quick` are slow."""
    both = [(*case, segmented) for case in cases for segmented in (True, False)]
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in both]


def check_against_dense(function, length, kv_heads, head_dim, segmented, **shapes):
    """Asserts that outputs and gradients of `function` equal dense attention."""
    query, key, value, weight, segments = arrays(length, kv_heads, head_dim, **shapes)
    segments = segments if segmented else None

    @functools.partial(jax.jit, static_argnums=0)
    def run(attention):
        output, gradients = jax.vjp(lambda *qkv: attention(*qkv, segments), query, key, value)
        return output, *gradients(weight)

    for ours, expected in zip(run(function), run(dense_attention), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


LENGTHS = [(1, 1), (100, 2), (128, 4), (300, 1), (300, 2), (300, 4)]  # and key-value heads


@pytest.mark.parametrize(
    ("length", "kv_heads", "segmented"),
    with_and_without_segments(LENGTHS, [(1, 1, True), (300, 2, True), (300, 1, False), (128, 4, False)]),
)
def test_xla_equals_dense_forward_and_backward(length, kv_heads, segmented):
    check_against_dense(lambda *args: attend(*args[:3], "xla", args[3]), length, kv_heads, 8, segmented)


@pytest.mark.parametrize(
    ("length", "kv_heads", "head_dim", "segmented"),
    [(128, 2, 128, False), (200, 1, 100, True), (600, 2, 8, True)],  # 600: two blocks; 100: 3b's heads
)
def test_splash_equals_dense_forward_and_backward(length, kv_heads, head_dim, segmented):
    run = lambda *args: attend(*args[:3], "splash", args[3], interpret=True)  # noqa: E731
    check_against_dense(run, length, kv_heads, head_dim, segmented, heads=2, batch=1)


SHARDED = [
    (MeshConfig(data=2, sequence=4), 8),
    (MeshConfig(data=1, fsdp=2, sequence=2, tensor=2), 4),
    (MeshConfig(data=1, sequence=8), 2),  # fewer key-value heads than devices
    (MeshConfig(data=2, sequence=2, tensor=2), 2),
]


@pytest.mark.parametrize(
    ("config", "kv_heads", "segmented"),
    with_and_without_segments(SHARDED, [(*SHARDED[0], True), (*SHARDED[1], False), (*SHARDED[2], True)]),
)
def test_sharded_sequence_equals_dense(config, kv_heads, segmented):
    mesh = make_mesh(config)

    def run(query, key, value, segments):
        # On the mesh, like the arrays of a training step.
        sharded = [
            jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec())) for x in (query, key, value)
        ]
        with sharding.use_mesh(mesh):
            return attend(*sharded, "xla", segments)

    check_against_dense(run, 24, kv_heads, 4, segmented, heads=8)


def test_sharded_sequence_must_divide_the_heads():
    query, key, value, _, _ = arrays(8, 4)
    with (
        sharding.use_mesh(make_mesh(MeshConfig(data=1, sequence=4, tensor=2))),
        pytest.raises(UserError, match=r"sequence × tensor = 4 × 2 .* 4 heads"),
    ):
        attend(query, key, value, "xla")


def count(jaxpr, name):
    """Occurrences of a primitive in a jaxpr and its sub-jaxprs."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            total += count(inner, name) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=4, sequence=2)])
@pytest.mark.parametrize(("policy", "runs"), [("none", 1), ("dots", 1), ("attention", 1), ("full", 2)])
def test_only_full_remat_recomputes_cudnn(policy, runs, mesh, monkeypatch):
    # Only traced: running cuDNN takes a GPU.
    internal = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(internal, "check_cudnn_version", lambda: 91000)
    run = jax.checkpoint(lambda x: attend(x * 2, x * 3, x * 4, "cudnn") * 5, policy=REMAT_POLICIES[policy])
    gradient = jax.grad(lambda x: jnp.sum(run(x).astype(jnp.float32)))
    with sharding.use_mesh(mesh and make_mesh(mesh)):
        program = jax.make_jaxpr(gradient)(jnp.zeros((4, 128, 2, 100), jnp.bfloat16)).jaxpr
    assert count(program, "dot_product_attention_fwd_wrapper") == runs


def test_cudnn_pads_head_dim_and_keeps_the_scale(monkeypatch):
    call = {}

    def record(query, key, value, **options):
        call.update(options, shapes=[x.shape for x in (query, key, value)])
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    query, key, value, _, _ = arrays(16, 2, head_dim=100)
    out = attend(query, key, value, "cudnn")
    np.testing.assert_array_equal(out, query)  # the padding is cut off
    assert call["shapes"] == [(2, 16, 4, 104), (2, 16, 2, 104), (2, 16, 2, 104)]
    assert call["scale"] == pytest.approx(0.1)
    assert (call["is_causal"], call["implementation"]) == (True, "cudnn")


def test_choose_kernel_by_platform():
    assert choose_kernel("auto", "cpu", "bfloat16", 128) == "xla"
    assert choose_kernel("auto", "gpu", "bfloat16", 128) == "cudnn"
    assert choose_kernel("auto", "gpu", "bfloat16", 160) == "xla"
    assert choose_kernel("auto", "gpu", "float32", 128) == "xla"
    assert choose_kernel("auto", "tpu", "bfloat16", 160) == "splash"
    assert choose_kernel("auto", "tpu", "bfloat16", 128, segmented=True) == "splash"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("splash", "gpu", "bfloat16", 128), "splash needs a TPU, this is gpu"),
        (("auto", "gpu", "bfloat16", 128, True), "cudnn cannot mask packed sentences"),
        (("cudnn", "gpu", "bfloat16", 160), "cudnn .* up to 128, this is 160"),
        (("cudnn", "cpu", "bfloat16", 128), "cudnn needs a GPU, this is cpu"),
        (("cudnn", "gpu", "float32", 128), "cudnn computes in bfloat16, dtype is float32"),
        (("flash", "cpu", "float32", 128), "'flash' must be one of"),
    ],
)
def test_choose_kernel_rejects_what_cannot_run(arguments, message):
    with pytest.raises(UserError, match=f"^attention={message}"):
        choose_kernel(*arguments)
