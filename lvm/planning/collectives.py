"""Collectives of a compiled step by kind, and the bytes that ideal fully sharded training (FSDP) would send."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import jax.numpy as jnp

from lvm.model.transformer import ModelConfig
from lvm.planning.hlo import Execution, HloArray, Program
from lvm.training.config import TrainConfig

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
PADDING = "padding"  # zeros that fill shards up to whole tiles, and the permutes that undo it
BETWEEN_SLICES = "between slices"
_TILES = (8, 16, 32, 128)
_COMPUTE = {"fusion", "custom-call", "convolution", "dot"}  # operations that can hide a collective


@dataclasses.dataclass
class Collective:
    """All collectives of one kind in a step.

    Attributes:
      kind: one of `KINDS`, `PADDING` or `BETWEEN_SLICES`.
      bytes: received by a chip, without padding.
      count: executions per step.
      overlapped_bytes: bytes of those that overlap with compute.
    """

    kind: str
    bytes: float
    count: int
    overlapped_bytes: float = 0.0

    def add(self, size: float, count: int, overlapped: bool) -> None:
        self.bytes += size
        self.count += count
        self.overlapped_bytes += size * overlapped


def collective_bytes(program: Program, weights: Iterable[Sequence[int]], chips: int) -> list[Collective]:
    """Collectives of a compiled step by kind.

    In a ring of g chips, each receives (g−1)/g of an all-gather's result and of the operand of a reduce-scatter or
    all-to-all, and twice that of an all-reduce. `weights`, the shapes of one layer's weights (`weight_shapes`), tell
    padding from content.
    """
    counter = _Counter(program, [tuple(shape) for shape in weights], chips)
    totals = {kind: Collective(kind, 0.0, 0) for kind in (*KINDS, BETWEEN_SLICES, PADDING)}
    for run in _distinct_executions(program):
        counted = counter.count(run)
        if counted is None:
            continue
        kind, size, padding = counted
        overlapped = bool(run.instruction.attribute("chain_id")) or _is_overlapped(run)
        if padding:
            totals[PADDING].add(padding * run.count, 0 if size else run.count, overlapped)
        if size or not padding:
            totals[kind].add(size * run.count, run.count, overlapped)
    return [total for total in totals.values() if total.count or total.bytes]


def _distinct_executions(program: Program) -> Iterator[Execution]:
    """Executions; a gather that spans several fusions appears in each of them and is yielded once."""
    chains: set[tuple[str, str]] = set()
    for run in program.executions():
        chain = (run.scope, run.instruction.attribute("chain_id"))
        if chain[1] and chain in chains:
            continue
        chains.add(chain)
        yield run


class _Counter:
    """Counts bytes received by collectives, and the padding among them."""

    def __init__(self, program: Program, weights: list[tuple[int, ...]], chips: int):
        self._weights, self._chips = weights, chips
        # (sharded dimension of two, size of the other) → size of a padded shard
        self._padded: dict[tuple[int, int], int] = {}
        for run in _distinct_executions(program):
            self.count(run)

    def count(self, run: Execution) -> tuple[str, float, float] | None:
        """Kind, bytes that a chip receives, and padding received beside them; None if it is no collective."""
        instruction = run.instruction
        kind = instruction.operation.removesuffix("-start")
        if kind == "send" and "is_host_transfer=true" in instruction.attributes:
            return BETWEEN_SLICES, float(instruction.arrays[0].bytes), 0.0
        if kind not in KINDS:
            return None
        arrays = instruction.arrays
        if instruction.operation.endswith("-start") and kind in ("all-gather", "collective-permute"):
            num_operands = max(1, len(instruction.operands))  # the result is (operands, results, …)
            arrays = arrays[num_operands : 2 * num_operands]
        if kind == "collective-permute":
            return self._count_permute(run, arrays[0])
        group = _group_size(instruction.attributes, self._chips)
        fraction = (group - 1) / group
        if kind == "reduce-scatter":
            fraction = group - 1.0  # of the result
        elif kind == "all-reduce":
            # Fused with a slice of its result, it is a reduce-scatter.
            if run.fused and any(i.operation == "dynamic-slice" for i in run.computation.values()):
                kind = "reduce-scatter"
            else:
                fraction *= 2
        padded = sum(array.bytes for array in arrays)
        content = sum(array.bytes * self._content_fraction(array, group) for array in arrays)
        return kind, content * fraction, (padded - content) * fraction

    def _content_fraction(self, array: HloArray, group: int) -> float:
        """Fraction of an array that is not padding of a weight's shards to whole tiles."""
        sizes = tuple(d for d in array.shape if d > 1)
        if len(sizes) != 2 or sizes in self._weights:
            return 1.0
        for axis, (size, other) in enumerate((sizes, sizes[::-1])):
            for weight in self._weights:
                if len(weight) == 2 and weight[1 - axis] == other and _is_padded(weight[axis], size, group):
                    self._padded[axis, other] = size // group
                    return weight[axis] / size
        return 1.0

    def _count_permute(self, run: Execution, array: HloArray) -> tuple[str, float, float]:
        """Permutes undo the padding of shards, or implement a gather or a scatter."""
        sizes = tuple(d for d in array.shape if d > 1)
        if len(sizes) == 2:
            for axis, (size, other) in enumerate((sizes, sizes[::-1])):
                if size <= self._padded.get((axis, other), 0):
                    return PADDING, 0.0, float(array.bytes)
        for weight in self._weights:
            if len(weight) == len(sizes):
                split = [(full, shard) for full, shard in zip(weight, sizes, strict=True) if full != shard]
                if len(split) == 1 and split[0][0] % split[0][1] == 0:
                    kind = "reduce-scatter" if _sends_partial_sums(run) else "all-gather"
                    return kind, float(array.bytes), 0.0
        return "collective-permute", float(array.bytes), 0.0


def _is_padded(size: int, padded_size: int, group: int) -> bool:
    """True if shards of `size`, each padded to whole tiles, have `padded_size` together."""
    if size % group or padded_size == size:
        return False
    return padded_size in [group * tile * -(-size // group // tile) for tile in _TILES]


def _sends_partial_sums(run: Execution) -> bool:
    """True if a permute sends a value computed in the loop: a gather passes on what it received, a scatter adds."""
    name = run.instruction.operands[0]
    seen: set[str] = set()
    root = run.computation.root
    while name not in seen and name in run.computation:
        seen.add(name)
        instruction = run.computation[name]
        if instruction.operation in ("add", "fusion", "dot", "convolution"):
            return True
        index = instruction.tuple_index
        source = run.computation.get(instruction.operands[0]) if instruction.operands else None
        if index is not None and source and source.operation == "parameter" and root.operation == "tuple":
            name = root.operands[index]  # value of the previous iteration, in a loop body
        elif instruction.operands:
            name = instruction.operands[0]
    return False


def _group_size(attributes: str, chips: int) -> int:
    """Chips per replica group."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return listed[1].count(",") + 1 if listed else chips


def _is_overlapped(run: Execution) -> bool:
    """True if compute is scheduled between a collective's start and done, or in the fusion that holds it."""
    if run.fused:
        return any(i.operation in ("convolution", "dot") for i in run.computation.values())
    if not run.instruction.operation.endswith("-start"):
        return False
    instructions = list(run.computation.values())
    for instruction in instructions[instructions.index(run.instruction) + 1 :]:
        if run.instruction.name in instruction.operands and instruction.operation.endswith("-done"):
            return False
        if instruction.operation in _COMPUTE:
            return True
    return False


def ideal_collective_bytes(config: TrainConfig, slices: int = 1) -> dict[str, float]:
    """Bytes that a chip receives per step of ideal fully sharded training, by kind, in the compute dtype.

    Every layer's weights are gathered for the forward and again for the backward pass and their gradients scattered
    once; embedding and output projection are gathered and scattered once; the gradients' shards are reduced over
    `data`. Under `tensor`, activations are reduced twice in each direction; under `sequence`, queries, keys, values
    and outputs are exchanged. `config` has vocabulary size and mesh resolved; `data` spans the slices.
    """
    model, mesh, accumulate_steps = config.model, config.mesh, config.objective.accumulate_steps
    width = jnp.dtype(model.dtype).itemsize
    data, fsdp, sequence, tensor = mesh.data, mesh.fsdp, mesh.sequence, mesh.tensor
    layers = width * model.num_layers * sum(math.prod(shape) for shape in layer_weight_shapes(model)) / tensor
    embeddings = width * (1 if model.tie_embeddings else 2) * model.vocabulary_size * model.hidden_size / tensor
    fraction = (fsdp - 1) / fsdp
    gradients = (layers + embeddings) / fsdp
    within = data // slices
    tokens = config.batch_size * model.context / (data * fsdp * sequence)  # per chip, all micro-batches
    activations = width * tokens * model.hidden_size
    exchanged = (2 + 2 * model.kv_heads / model.num_heads) * activations / tensor
    sizes = {
        "all-gather": accumulate_steps * (2 * layers + embeddings) * fraction,
        "reduce-scatter": accumulate_steps * (layers + embeddings) * fraction,
        # Over `sequence`, gradients are reduced as whole shards.
        "all-reduce": 2 * gradients * ((within - 1) / within + (sequence - 1) / sequence)
        + model.num_layers * 4 * 2 * activations * (tensor - 1) / tensor,
        "all-to-all": model.num_layers * 2 * exchanged * (sequence - 1) / sequence,
        BETWEEN_SLICES: 2 * gradients / within * (slices - 1) / slices,
    }
    return {kind: size for kind, size in sizes.items() if size}


def layer_weight_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """Shapes of one layer's weights, with heads × head dim as one dimension."""
    D, F = model.hidden_size, model.mlp_size
    heads, kv_heads = model.num_heads * model.head_dim, model.kv_heads * model.head_dim
    return [(D, heads), (D, kv_heads), (D, kv_heads), (heads, D), (D, F), (D, F), (F, D)]


def weight_shapes(model: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes that the model's weights may have in a program: as they are, with heads split, and transposed."""
    V, D, d = model.vocabulary_size, model.hidden_size, model.head_dim
    H, K = model.num_heads, model.kv_heads
    shapes = [*layer_weight_shapes(model), (V, D), (D, H, d), (D, K, d), (H, d, D)]
    return list(dict.fromkeys([*shapes, *(shape[::-1] for shape in shapes)]))
