"""Which meshes divide a model, its batch and a number of chips."""

from __future__ import annotations

import dataclasses
import math

from lvm.common.errors import UserError
from lvm.hardware.sharding import AXES, MeshConfig
from lvm.model.transformer import ModelConfig


def resolved(asked: MeshConfig, chips: int) -> MeshConfig:
    """With what the others leave in place of -1, rounded down where they don't divide the chips."""
    fixed = math.prod(getattr(asked, axis) for axis in AXES if getattr(asked, axis) != -1)
    return dataclasses.replace(asked, **{a: max(1, chips // fixed) for a in AXES if getattr(asked, a) == -1})


def valid_meshes(
    model: ModelConfig, asked: MeshConfig, chips: int, slices: int, rows: int = 0, parts: int = 1
) -> list[MeshConfig]:
    """Meshes with the `sequence` and `tensor` that are asked for, which divide the model and the chips.

    Args:
      model: its vocabulary size set.
      asked: see above.
      chips: of all slices.
      slices: that `data` goes over.
      rows: of a batch that they must divide too; 0 for any.
      parts: `accumulate_steps`.
    """
    sequence, tensor = asked.sequence, asked.tensor
    fits = (
        model.num_heads % (sequence * tensor) == 0
        and model.kv_heads % tensor == 0
        and model.mlp_size % tensor == 0
        and model.vocabulary_size % tensor == 0
        and model.context % sequence == 0
        and chips % (sequence * tensor * slices) == 0
    )
    if not fits:
        return []
    ways = chips // (sequence * tensor)
    found = [
        dataclasses.replace(asked, data=ways // fsdp, fsdp=fsdp)
        for fsdp in range(1, ways // slices + 1)
        if ways % (fsdp * slices) == 0 and model.hidden_size % fsdp == 0
    ]
    return [mesh for mesh in found if rows % (mesh.data * mesh.fsdp * parts) == 0]


def checked(
    model: ModelConfig, asked: MeshConfig, chips: int, slices: int, rows: int, parts: int
) -> MeshConfig:
    """The mesh that is asked for, without -1.

    Raises:
      UserError: it doesn't divide the chips, the model or the batch; names the nearest that does.
    """
    wanted = resolved(asked, chips)
    if wanted in valid_meshes(model, wanted, chips, slices, rows, parts):
        return wanted
    said = " × ".join(f"{axis} {getattr(wanted, axis)}" for axis in AXES)
    problem = f"config.mesh: {said} doesn't divide {chips} chips{_in(slices)}, {rows} rows"
    problem += f" in {parts} parts" if parts > 1 else ""
    problem += f", a hidden size of {model.hidden_size} and {model.num_heads} heads"
    plain = dataclasses.replace(wanted, sequence=1, tensor=1)
    for shape in (wanted, plain):
        possible = valid_meshes(model, shape, chips, slices, rows, parts)
        if possible:
            return _refuse(problem, _nearest(possible, wanted))
    possible = valid_meshes(model, wanted, chips, slices) or valid_meshes(model, plain, chips, slices)
    if not possible:
        raise UserError(f"{problem}; no mesh of so many chips does")
    mesh = _nearest(possible, wanted)
    ways = mesh.data * mesh.fsdp
    more = max(1, round(rows / ways)) * ways
    return _refuse(problem, mesh, f" with config.batch_size={more} config.objective.accumulate_steps=1")


def _refuse(problem: str, mesh: MeshConfig, more: str = "") -> MeshConfig:
    keys = " ".join(f"config.mesh.{axis}={getattr(mesh, axis)}" for axis in AXES)
    raise UserError(f"{problem}; the nearest that does: {keys}{more}")


def _nearest(possible: list[MeshConfig], wanted: MeshConfig) -> MeshConfig:
    return min(possible, key=lambda mesh: abs(math.log(mesh.fsdp / wanted.fsdp)))


def _in(slices: int) -> str:
    return f" in {slices} slices" if slices > 1 else ""
