"""HBM traffic and FLOPs of a step, for its roofline."""

from lvm.model.flops import train_flops_per_token
from lvm.model.transformer import ModelConfig
from lvm.planning.collectives import KINDS
from lvm.planning.hlo import Computation, Execution, Instruction, Program

# Operations that move no data.
_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "async-start", "async-update", "async-done",
}  # fmt: skip
_VIEWS = ("bitcast", "reshape")


def hbm_bytes(program: Program) -> int:
    """Bytes that a step reads from and writes to one chip's HBM, loop bodies times their trip count.

    A fusion reads its operands and writes its results once; of an array that it slices it reads the slice, and of one
    that it updates in place it writes the update. On-chip memory is free.
    """
    return sum(run.count * _traffic(run, program) for run in program.executions() if not run.fused)


def _traffic(run: Execution, program: Program) -> int:
    instruction = run.instruction
    operation = instruction.operation
    if operation in _FREE or operation.endswith("-done"):
        return 0
    if operation == "fusion":
        return _fusion_traffic(instruction, run.computation, program)
    operands = [run.computation[name].hbm_bytes for name in instruction.operands if name in run.computation]
    written = instruction.hbm_bytes
    if operation in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if operation == "dynamic-update-slice":
        return 2 * operands[1]
    if operation.endswith("-start"):  # the results repeat the operands
        written = max(0, written - sum(operands))
    return written + sum(operands)


def _fusion_traffic(fusion: Instruction, caller: Computation, program: Program) -> int:
    body = program.computations[fusion.called("calls")]
    total = 0
    for index, name in enumerate(fusion.operands):
        if name in caller and caller[name].hbm_bytes:
            total += _bytes_read(body.parameter(index), body, program)
    results = [body[name] for name in body.root.operands] if body.root.operation == "tuple" else [body.root]
    for array, result in zip(fusion.arrays, results, strict=False):
        if array.in_hbm:
            total += _bytes_written(result, body)
    return total


def _bytes_read(value: Instruction, body: Computation, program: Program) -> int:
    """Bytes of a value that its users in a fusion read."""
    total = 0
    for user in (i for i in body.values() if value.name in i.operands):
        if user.operation in _VIEWS:
            total += _bytes_read(user, body, program)
        elif user.operation == "fusion":
            inner = program.computations[user.called("calls")]
            total += _bytes_read(inner.parameter(user.operands.index(value.name)), inner, program)
        elif user.operation in ("dynamic-slice", "slice"):
            total += user.bytes
        elif user.operation == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # updated in place
        elif user.operation == "tuple" or user.operation.removesuffix("-start") in KINDS:
            continue  # passed on; a collective's traffic is counted where it ends
        else:
            return value.bytes
    return min(total, value.bytes)


def _bytes_written(result: Instruction, body: Computation) -> int:
    while result.operation in _VIEWS:
        result = body[result.operands[0]]
    if result.operation == "dynamic-update-slice":
        return body[result.operands[1]].bytes
    return 0 if result.operation == "parameter" else result.bytes


def hardware_flops(model: ModelConfig, batch_size: int) -> float:
    """FLOPs of a step with rematerialization: `lvm.model.flops` (causal) and what the backward pass recomputes."""
    tokens = batch_size * model.context
    total = tokens * train_flops_per_token(model, model.context, "causal")
    forward = total / 3
    logits = 2.0 * tokens * model.hidden_size * model.vocabulary_size
    scores = 2.0 * tokens * model.num_layers * model.num_heads * model.head_dim * model.context
    recomputed = {"full": forward - logits, "attention": forward - logits - scores}.get(model.remat, 0.0)
    return total + recomputed + logits  # every policy recomputes the logits
