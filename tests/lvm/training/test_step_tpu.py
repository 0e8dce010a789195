"""The step compiled for absent TPUs: collectives, matrix products, donation and temporaries of its program."""

import dataclasses
import os
import re

import jax
import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.model.nnx_utils import count_params
from lvm.model.transformer import SIZES, ModelConfig
from lvm.training.next_token import NextTokenTask, ObjectiveConfig
from lvm.training.optimizer import OptimizerConfig, build
from lvm.training.step import Step

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install '.[plan]'")
MIB = 2**20


def devices(topology, **options):
    """The devices of a described topology."""
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    }
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # tests run concurrently
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def make_step(config, mesh, batch_size, chunk, zero1=False, accumulate_steps=1):
    C = config.context
    spec = {
        "tokens": jax.ShapeDtypeStruct((batch_size, C + 1), np.int32),
        "loss_mask": jax.ShapeDtypeStruct((batch_size, C), np.bool_),
        "positions": jax.ShapeDtypeStruct((batch_size, C), np.int32),
        "component_ids": jax.ShapeDtypeStruct((batch_size, C), np.int16),
    }
    tx, schedule = build(OptimizerConfig(), 100_000)
    objective = ObjectiveConfig(logits_chunk=chunk, accumulate_steps=accumulate_steps)
    return Step(NextTokenTask(config, spec, ["all"], tx, schedule, mesh, objective), mesh, seed=0, zero1=zero1)


SMALL = ModelConfig(
    hidden_size=256, mlp_size=512, num_layers=6, num_heads=2, vocabulary_size=512, context=512, remat="dots"
)  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    """A small step over four chips of v5e."""
    step = make_step(SMALL, make_mesh(MeshConfig(data=1, fsdp=4), devices("v5e:2x2")), 4, 128)
    assert step.task.kernel == "splash"
    return step, step.compile().as_text()


def definitions(text):
    """Name → (dtype, shape, operation, operands) of every array that the program defines."""
    pattern = re.compile(r"%([\w.\-]+) = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(([^)]*)\)")
    arrays = {}
    for name, dtype, shape, operation, operands in pattern.findall(text):
        dimensions = tuple(int(d) for d in shape.split(",") if d)
        arrays[name] = dtype, dimensions, operation, re.findall(r"%([\w.\-]+)", operands)
    return arrays


def collective_operands(text):
    """(dtype, number of elements) of every operand of a collective."""
    lines = [line for line in text.splitlines() if re.search(r" (all-gather|collective-permute)(-start)?\(", line)]
    assert lines
    shapes = [re.findall(r"(bf16|f32)\[([\d,]+)\]", line.split(" = ")[1].split("(%")[0]) for line in lines]
    return [(dtype, np.prod([int(d) for d in shape.split(",")])) for group in shapes for dtype, shape in group]


def test_weights_are_gathered_in_bfloat16_per_layer(compiled):
    _, text = compiled
    largest_kernel = max(SMALL.hidden_size * SMALL.mlp_size, SMALL.hidden_size * SMALL.vocabulary_size)
    for dtype, size in collective_operands(text):
        assert size <= largest_kernel  # a stack of layers is six times as large
        assert dtype == "bf16" or size <= SMALL.hidden_size


def test_matmuls_are_bfloat16_with_float32_sums(compiled):
    _, text = compiled
    arrays = definitions(text)
    products = [entry for entry in arrays.values() if entry[2] in ("convolution", "dot")]
    assert len(products) > 10
    for _, shape, _, operands in products:
        assert {arrays[name][0] for name in operands if name in arrays} <= {"bf16"}, shape
    # The unit that multiplies them sums in float32; the logits are kept so.
    logits = [dtype for dtype, shape, _, _ in products if shape[-2:] == (128, SMALL.vocabulary_size)]
    assert logits
    assert set(logits) == {"f32"}


def test_state_is_donated(compiled):
    step, _ = compiled
    memory = step.compile().memory_analysis()
    state = sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(step.state))
    assert memory.alias_size_in_bytes >= state
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < MIB


@pytest.mark.slow
def test_accumulation_and_zero1_send_no_moments():
    # XLA for TPU used to fail on accumulation with fsdp; moments sharded unlike gradients would be resharded.
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), devices("v5e:2x2"))
    step = make_step(SMALL, mesh, 8, 256, zero1=True, accumulate_steps=2)
    text = step.compile().as_text()
    permuted = [line for line in text.splitlines() if re.search(r" collective-permute(-start)?\(", line)]
    assert not [line for line in permuted if "= f32[" in line or "= (f32[" in line]
    moments = [x for x in jax.tree.leaves(step.state["training"]["optimizer"]) if x.ndim == 3]
    assert moments
    assert all(np.prod(x.sharding.shard_shape(x.shape)) * 4 == x.size for x in moments)


@pytest.mark.slow
def test_slices_exchange_sharded_gradients_alone():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), devices("v5e:2x2", num_slices=2))
    text = make_step(SMALL, mesh, 8, 256).compile().as_text()
    sent = re.findall(r"= \((\w+)\[([\d,]*)\]\S*, .* send\(", text)
    assert sent
    whole = SMALL.hidden_size * SMALL.vocabulary_size
    assert max(np.prod([int(d) for d in shape.split(",")]) for dtype, shape in sent if shape) < whole


@pytest.mark.parametrize(
    ("topology", "config"),
    [
        ("v6e:16x16", MeshConfig(data=2, fsdp=128)),
        ("v5p:4x4x8", MeshConfig(data=2, fsdp=64)),
        ("v5p:4x4x8", MeshConfig(data=1, fsdp=64, tensor=2)),
        ("v5e:16x16", MeshConfig(data=4, fsdp=64)),
    ],
)
def test_common_meshes_fit_every_pod(topology, config):
    chips = devices(topology)
    mesh = make_mesh(config, chips)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in chips}
    assert mesh.devices.shape == (config.data, config.fsdp, 1, config.tensor)


def test_slices_are_split_by_data_axis_alone():
    mesh = make_mesh(MeshConfig(data=2, fsdp=8), devices("v5e:2x4", num_slices=2))
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert mesh.devices.shape == (2, 8, 1, 1)
    assert set(slices[0].ravel()) == {0}
    assert set(slices[1].ravel()) == {1}


def test_mesh_refuses_data_axis_below_slices():
    with pytest.raises(UserError, match=r"config\.mesh\.data=1 .*2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=16), devices("v5e:2x4", num_slices=2))


@pytest.mark.parametrize(("remat", "kernels"), [("dots", 3), pytest.param("full", 4, marks=pytest.mark.slow)])
def test_full_remat_alone_reruns_attention(compiled, remat, kernels):
    # Its forward, and its backward for the queries and for the keys and values, each in the loop over layers.
    text = compiled[1]
    if remat != SMALL.remat:
        config = dataclasses.replace(SMALL, remat=remat)
        text = make_step(config, compiled[0].mesh, 4, 128).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == kernels


@pytest.mark.slow
def test_temporaries_of_1b_step_match_formula():
    """At most 1.25 × the following, for one row of T = 4096 tokens on each of 16 chips of v5e, remat `dots`.

    With D hidden, F MLP, V vocabulary, L layers, c tokens of logits at a time, 2 bytes a value unless noted:

    - scan carries: L · T · D;
    - residuals that `dots` keeps: L · (query, key, value, attention's result and its projection, 5 · T · D; gate
      and up, 2 · T · F), and attention's statistics, 4 bytes · T for each head;
    - logits: 3 · c · V (they, their exponentials, their gradient), 4 bytes;
    - one layer's gathered weights, and its gradients before they are summed over the chips: 2 · (4 · D² + 3 · D · F);
    - embedding and head: gathered, V · D each, and wide for their gradients' sums, 4 bytes · 2 · V · D each.
    """
    config = dataclasses.replace(SIZES["1b"], vocabulary_size=8448, remat="dots")
    step = make_step(config, make_mesh(MeshConfig(data=1, fsdp=16), devices("v5e:4x4")), 16, 1024)
    T, D, F, L, V, c = 4096, config.hidden_size, config.mlp_size, config.num_layers, 8448, 1024
    carries = 2 * L * T * D
    residuals = L * (2 * (5 * T * D + 2 * T * F) + 4 * T * config.num_heads)
    logits = 4 * 3 * c * V
    layer = 2 * 2 * (4 * D * D + 3 * D * F)
    ends = 2 * (2 * V * D + 4 * 2 * V * D)
    expected = carries + residuals + logits + layer + ends
    temporaries = step.compile().memory_analysis().temp_size_in_bytes
    print(
        f"temporaries {temporaries / MIB:.0f} MiB, formula {expected / MIB:.0f} MiB, ratio {temporaries / expected:.3f}"
    )
    assert count_params(step.task.params_shape) == 1_147_119_616 + 2 * (8448 - 8292) * D
    assert 0.8 * expected < temporaries <= 1.25 * expected
