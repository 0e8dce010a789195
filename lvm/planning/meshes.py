"""Meshes that divide a model, its batch and the chips."""

import dataclasses
import math

from lvm.common.errors import UserError
from lvm.hardware.sharding import AXES, MeshConfig, resolve_mesh
from lvm.model.transformer import ModelConfig
from lvm.training.config import TrainConfig


def format_mesh(mesh: MeshConfig) -> str:
    """`data 4 × fsdp 64`: the axes larger than 1; "1" if there are none."""
    return " × ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1) or "1"


def valid_meshes(
    model: ModelConfig, mesh: MeshConfig, chips: int, slices: int, batch_size: int = 0, accumulate_steps: int = 1
) -> list[MeshConfig]:
    """Every `data` × `fsdp` that divides model, chips and batch (0: any), with the other fields of `mesh`.

    `model` has its vocabulary size set; `chips` are those of all slices, which `data` spans.
    """
    sequence, tensor = mesh.sequence, mesh.tensor
    divides = (
        model.num_heads % (sequence * tensor) == 0
        and model.kv_heads % tensor == 0
        and model.mlp_size % tensor == 0
        and model.vocabulary_size % tensor == 0
        and model.context % sequence == 0
        and chips % (sequence * tensor * slices) == 0
    )
    if not divides:
        return []
    shards = chips // (sequence * tensor)
    return [
        dataclasses.replace(mesh, data=shards // fsdp, fsdp=fsdp)
        for fsdp in range(1, shards // slices + 1)
        if shards % (fsdp * slices) == 0
        and model.hidden_size % fsdp == 0
        and batch_size % (shards * accumulate_steps) == 0
    ]


def validate_mesh(config: TrainConfig, chips: int, slices: int) -> MeshConfig:
    """The mesh of `config` without -1.

    Raises:
      UserError: the mesh does not divide chips, model or batch; names the nearest that does.
    """
    model, batch_size, steps = config.model, config.batch_size, config.objective.accumulate_steps
    mesh = resolve_mesh(config.mesh, chips)
    unsplit = dataclasses.replace(mesh, sequence=1, tensor=1)
    valid = valid_meshes(model, mesh, chips, slices, batch_size, steps)
    if mesh in valid:
        return mesh
    valid = valid or valid_meshes(model, unsplit, chips, slices, batch_size, steps)
    batch = ""
    if not valid:
        valid = valid_meshes(model, mesh, chips, slices) or valid_meshes(model, unsplit, chips, slices)
        shards = valid[0].data * valid[0].fsdp if valid else 1
        rows = max(1, round(batch_size / shards)) * shards
        batch = f" config.batch_size={rows} config.objective.accumulate_steps=1"
    problem = (
        f"config.mesh: {format_mesh(mesh)} does not divide {chips} chips{f' in {slices} slices' * (slices > 1)}, "
        f"config.batch_size={batch_size}{f' in {steps} micro-batches' * (steps > 1)}, "
        f"hidden_size={model.hidden_size} or num_heads={model.num_heads}"
    )
    if not valid:
        raise UserError(f"{problem}; no mesh of {chips} chips does")
    nearest = min(valid, key=lambda candidate: abs(math.log(candidate.fsdp / mesh.fsdp)))
    keys = " ".join(f"config.mesh.{axis}={getattr(nearest, axis)}" for axis in AXES)
    raise UserError(f"{problem}; nearest valid: {keys}{batch}")
