"""How fast a step could be at best: by its arithmetic, by what it moves through memory, by what it sends."""

from __future__ import annotations

from lvm.hardware.accelerators import Slice
from lvm.model.flops import train_flops_per_token
from lvm.model.transformer import ModelConfig
from lvm.planning.collectives import BETWEEN_SLICES, KINDS, Collective
from lvm.planning.hlo import Computation, Instruction, Program, Run

# These only name or order what others made.
_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "async-start", "async-update", "async-done",
}  # fmt: skip
_THROUGH = ("bitcast", "reshape")


def hbm_bytes(program: Program) -> int:
    """Bytes that a step reads from and writes to a chip's main memory, loops counted as often as they run.

    A fusion reads its operands and writes its results once. Of an array that it only slices it reads the slice, and
    where it writes into a part of one, it writes the part. What stays in the memory on the chip costs nothing.
    """
    return sum(run.times * _moved(run, program) for run in program.runs() if not run.fused)


def _moved(run: Run, program: Program) -> int:
    instruction = run.instruction
    operation = instruction.operation
    if operation in _FREE or operation.endswith("-done"):
        return 0
    if operation == "fusion":
        return _by_fusion(instruction, run.computation, program)
    operands = [run.computation[name] for name in instruction.operands if name in run.computation]
    written = _in_hbm(instruction)
    if operation in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if operation == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1])
    if operation.endswith("-start"):  # gives its operands again beside its results
        written = max(0, written - sum(_in_hbm(operand) for operand in operands))
    return written + sum(_in_hbm(operand) for operand in operands)


def _in_hbm(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays if array.in_hbm)


def _by_fusion(fusion: Instruction, around: Computation, program: Program) -> int:
    inside = program.computations[fusion.called("calls") or ""]
    total = 0
    for place, name in enumerate(fusion.operands):
        if name in around and _in_hbm(around[name]):
            total += _read(_parameter(inside, place), inside, program)
    root = next(i for i in inside.values() if i.is_root)
    results = [inside[name] for name in root.operands] if root.operation == "tuple" else [root]
    for array, result in zip(fusion.arrays, results, strict=False):
        if array.in_hbm:
            total += _written(result, inside)
    return total


def _parameter(inside: Computation, place: int) -> Instruction:
    return next(i for i in inside.values() if i.operation == "parameter" and i.literal == str(place))


def _read(value: Instruction, inside: Computation, program: Program) -> int:
    """What of an array a fusion reads."""
    total = 0
    for user in (i for i in inside.values() if value.name in i.operands):
        if user.operation in _THROUGH:
            total += _read(user, inside, program)
        elif user.operation == "fusion":
            within = program.computations[user.called("calls") or ""]
            total += _read(_parameter(within, user.operands.index(value.name)), within, program)
        elif user.operation in ("dynamic-slice", "slice"):
            total += user.bytes
        elif user.operation == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # written into
        elif user.operation == "tuple" or user.operation.removesuffix("-start") in KINDS:
            continue  # handed on; what a collective moves is counted where it ends
        else:
            return value.bytes
    return min(total, value.bytes)


def _written(result: Instruction, inside: Computation) -> int:
    while result.operation in _THROUGH:
        result = inside[result.operands[0]]
    if result.operation == "dynamic-update-slice":
        return inside[result.operands[1]].bytes
    return 0 if result.operation == "parameter" else result.bytes


def computed_flops(model: ModelConfig, rows: int) -> float:
    """Operations of a step over `rows` rows with what rematerialisation computes again: `lvm.model.flops`, causal."""
    tokens = rows * model.context
    whole = tokens * train_flops_per_token(model, model.context, "causal")
    forward = whole / 3
    logits = 2.0 * tokens * model.hidden_size * model.vocabulary_size
    scores = 2.0 * tokens * model.num_layers * model.num_heads * model.head_dim * model.context
    again = {"full": forward - logits, "attention": forward - logits - scores}.get(model.remat, 0.0)
    return whole + again + logits  # the logits' are computed again under every policy


def seconds(
    described: Slice, chips: int, flops: float, memory: float, sent: list[Collective]
) -> dict[str, float]:
    """Lower bounds of a step's time: each as if it alone took time, at the chip's published peak.

    Args:
      described: the slice, or the GPUs, with their peaks.
      chips: that share `flops`, of all slices.
      flops: of all chips.
      memory: bytes through one chip's main memory.
      sent: what a chip receives; padding travels too.
    """
    within = sum(collective.bytes for collective in sent if collective.kind != BETWEEN_SLICES)
    between = sum(collective.bytes for collective in sent if collective.kind == BETWEEN_SLICES)
    accelerator = described.accelerator
    found = {
        "flops": flops / chips / accelerator.peak_flops,
        "hbm": memory / accelerator.hbm_bandwidth,
        "ici": within / described.link_bandwidth,
    }
    if between and accelerator.network_bandwidth:
        found["network"] = between / accelerator.network_bandwidth
    return found
