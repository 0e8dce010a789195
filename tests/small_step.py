"""A small training step and its batches; as a program, one of several processes that train together."""

import dataclasses
import json
import sys

import jax
import numpy as np
import optax

from lvm.common import distributed
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.model.transformer import ModelConfig
from lvm.training.next_token import NextTokenTask, ObjectiveConfig
from lvm.training.optimizer import OptimizerConfig, build
from lvm.training.step import Step

CONFIG = ModelConfig(
    hidden_size=32, mlp_size=48, num_layers=2, num_heads=4, num_kv_heads=2, vocabulary_size=64, context=16,
    init_std=0.2, dtype="float32", attention="xla",
)  # fmt: skip
B, C = 8, 16
HELDOUT = (100, 101)  # seeds of batches
ADAMW = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)


def batch(seed):
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, 64, (B, C + 1), dtype=np.int32),
        "loss_mask": rng.random((B, C)) < 0.8,
        "positions": np.tile(np.arange(C, dtype=np.int32), (B, 1)),
        "component_ids": rng.integers(0, 2, (B, C), dtype=np.int16),
    }


def sgd():
    schedule = optax.constant_schedule(0.1)
    return optax.sgd(schedule), schedule


OPTIMIZERS = {"sgd": sgd, "adamw": lambda: build(ADAMW, 100)}


def make_step(mesh, optimizer=None, zero1=False, config=CONFIG, **objective):
    """A step on a mesh of all devices, or on one device if `mesh` is None."""
    devices = jax.devices()[:1] if mesh is None else jax.devices()
    mesh = make_mesh(mesh or MeshConfig(), devices)
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch(0).items()}
    tx, schedule = optimizer or OPTIMIZERS["adamw"]()
    task = NextTokenTask(
        config, spec, ["cats", "dogs"], tx, schedule, mesh, ObjectiveConfig(logits_chunk=4, **objective)
    )
    return Step(task, mesh, seed=3, zero1=zero1)


def main(kind, address, num_processes, process, mesh):
    """Trains for 20 steps with the given optimizer as one process, with two devices.

    Prints the losses, the norms of the first step, and the initial held-out loss.
    """
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.distributed.initialize(address, int(num_processes), int(process))
    step = make_step(MeshConfig(**json.loads(mesh)), OPTIMIZERS[kind]())
    state, losses, norms = step.init(), [], {}
    heldout = [{name: x[step.rows] for name, x in batch(seed).items()} for seed in HELDOUT]
    heldout_loss = dataclasses.replace(
        step.task, heldout=heldout, objective=ObjectiveConfig(logits_chunk=4, accumulate_steps=2)
    ).evaluate(state)
    for seed in range(20):
        state, metrics = step(state, step.shard_batch({name: x[step.rows] for name, x in batch(seed).items()}))
        losses.append(float(metrics["loss"]))
        norms = norms or {name: float(metrics[name]) for name in ("grad_norm", "param_norm")}
    broadcast = [
        distributed.broadcast(2**40 + 5 if jax.process_index() == 0 else 7),
        distributed.broadcast(-1),
    ]
    figures = {"losses": losses, **norms, **heldout_loss}
    print(json.dumps({**figures, "devices": jax.device_count(), "broadcast": broadcast}))


if __name__ == "__main__":
    main(*sys.argv[1:])
