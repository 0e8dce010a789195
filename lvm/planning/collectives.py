"""What a compiled step sends between chips, by kind, and what fully sharded training should send."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lvm.model.transformer import ModelConfig
from lvm.planning.hlo import Array, Program, Run

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
PADDING = (
    "padding"  # zeros that make shards as large as the network's blocks, and what moves them back into place
)
BETWEEN_SLICES = "between slices"
_TILES = (8, 16, 32, 128)
_WORK = {"fusion", "custom-call", "convolution", "dot"}  # what a collective may run beside


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind, all that run in one step.

    Attributes:
      kind: of `KINDS`, or `PADDING`, or `BETWEEN_SLICES`.
      bytes: that a chip receives, padding left out.
      count: how many run.
      overlapped: bytes of those that compute runs beside.
    """

    kind: str
    bytes: float
    count: int
    overlapped: float = 0.0


def collective_bytes(program: Program, weights: Iterable[Sequence[int]], chips: int) -> list[Collective]:
    """The collectives of a compiled step by kind.

    A chip of a group of g receives (g−1)/g of what a gather gives, of what a reduce-scatter or an all-to-all takes,
    and twice that of an all-reduce, as on a ring.

    Args:
      program: what was compiled.
      weights: shapes of the model's matrices, one layer's each, by which padding is told from content.
      chips: of the program.
    """
    reader = _Reader(program, [tuple(shape) for shape in weights], chips)
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0, 0.0])
    for run in _once(program):
        found = reader.read(run)
        if found is None:
            continue
        kind, size, padding = found
        beside = bool(run.instruction.attribute("chain_id")) or _overlaps(run)
        if padding:
            _add(totals[PADDING], padding * run.times, 0 if size else run.times, beside)
        if size or not padding:
            _add(totals[kind], size * run.times, run.times, beside)
    order = [*KINDS, BETWEEN_SLICES, PADDING]
    return [
        Collective(kind, totals[kind][0], int(totals[kind][1]), totals[kind][2])
        for kind in order
        if kind in totals
    ]


def _add(total: list[float], size: float, count: int, beside: bool) -> None:
    total[0] += size
    total[1] += count
    total[2] += size * beside


def _once(program: Program) -> Iterator[Run]:
    """What runs; of a gather that is spread over several fusions, and stands in each of them, the first alone."""
    chains: set[tuple[str, str]] = set()
    for run in program.runs():
        chain = (run.scope, run.instruction.attribute("chain_id"))
        if not chain[1]:
            yield run
        elif chain not in chains:
            chains.add(chain)
            yield run


class _Reader:
    """Knows a program's collectives, and which of their bytes are padding."""

    def __init__(self, program: Program, matrices: list[tuple[int, ...]], chips: int):
        self._matrices, self._chips = matrices, chips
        self._padded: dict[
            tuple[int, int], int
        ] = {}  # (which dimension of two, size of the other) → a padded shard
        for run in _once(program):
            self.read(run)

    def read(self, run: Run) -> tuple[str, float, float] | None:
        """Kind, bytes that a chip receives, and those of padding beside them; None for what is no collective."""
        instruction = run.instruction
        kind = instruction.operation.removesuffix("-start")
        if kind == "send" and "is_host_transfer=true" in instruction.attributes:
            return BETWEEN_SLICES, instruction.arrays[0].bytes, 0.0
        if kind not in KINDS:
            return None
        arrays = instruction.arrays
        if instruction.operation.endswith("-start") and kind in ("all-gather", "collective-permute"):
            given = max(1, len(instruction.operands))  # what it takes, then what it gives
            arrays = arrays[given : 2 * given]
        if kind == "collective-permute":
            return self._permute(run, arrays[0])
        group = _group_size(instruction.attributes, self._chips)
        share = (group - 1) / group
        if kind == "reduce-scatter":
            share = group - 1.0  # of what it gives
        elif kind == "all-reduce":
            # A fused one gives each chip its own part alone.
            scattered = run.fused and any(i.operation == "dynamic-slice" for i in run.computation.values())
            kind, share = ("reduce-scatter", share) if scattered else (kind, 2 * share)
        whole = sum(array.bytes for array in arrays)
        true = sum(array.bytes * self._unpadded(array, group) for array in arrays)
        return kind, true * share, (whole - true) * share

    def _unpadded(self, array: Array, group: int) -> float:
        """The share of an array that isn't padding of a matrix's shards to whole tiles."""
        sizes = tuple(d for d in array.shape if d > 1)
        if len(sizes) != 2 or sizes in self._matrices:
            return 1.0
        for place, (size, other) in enumerate((sizes, sizes[::-1])):
            for matrix in self._matrices:
                if len(matrix) != 2 or matrix[1 - place] != other:
                    continue
                true = matrix[place]
                if _is_padded(true, size, group):
                    self._padded[place, other] = size // group
                    return true / size
        return 1.0

    def _permute(self, run: Run, array: Array) -> tuple[str, float, float]:
        """Permutes move padded shards to where true ones lie, or are a gather or a scatter taken apart."""
        sizes = tuple(d for d in array.shape if d > 1)
        if len(sizes) == 2:
            for place, (size, other) in enumerate((sizes, sizes[::-1])):
                if size <= self._padded.get((place, other), 0):
                    return PADDING, 0.0, array.bytes
        for matrix in self._matrices:
            if len(matrix) == len(sizes):
                split = [(whole, part) for whole, part in zip(matrix, sizes, strict=True) if whole != part]
                if len(split) == 1 and split[0][0] % split[0][1] == 0:
                    return "reduce-scatter" if _carries_sums(run) else "all-gather", array.bytes, 0.0
        return "collective-permute", array.bytes, 0.0


def _is_padded(true: int, size: int, group: int) -> bool:
    """Whether shards of `true` numbers, filled up to whole tiles, are `size` together."""
    if true % group or size == true:
        return False
    return size in [group * tile * -(-true // group // tile) for tile in _TILES]


def _carries_sums(run: Run) -> bool:
    """Whether what a permute sends was computed on the way: a sum goes around, where a gather sends on what it got."""
    name = run.instruction.operands[0]
    seen: set[str] = set()
    root = next(i for i in run.computation.values() if i.is_root)
    while name not in seen and name in run.computation:
        seen.add(name)
        instruction = run.computation[name]
        if instruction.operation in ("add", "fusion", "dot", "convolution"):
            return True
        index = re.search(r"index=(\d+)", instruction.attributes)
        source = run.computation.get(instruction.operands[0]) if instruction.operands else None
        if index and source and source.operation == "parameter" and root.operation == "tuple":
            name = root.operands[int(index[1])]  # of the round before, where this is a loop's body
        elif instruction.operands:
            name = instruction.operands[0]
    return False


def _group_size(attributes: str, chips: int) -> int:
    """How many chips take part together."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return listed[1].count(",") + 1 if listed else chips


def _overlaps(run: Run) -> bool:
    """Whether work stands between a collective's start and its end, or in the fusion that holds both."""
    if run.fused:
        return any(i.operation in ("convolution", "dot") for i in run.computation.values())
    if not run.instruction.operation.endswith("-start"):
        return False
    names = list(run.computation)
    after = names[names.index(run.instruction.name) + 1 :]
    for name in after:
        instruction = run.computation[name]
        if run.instruction.name in instruction.operands and instruction.operation.endswith("-done"):
            return False
        if instruction.operation in _WORK:
            return True
    return False


def ideal_collective_bytes(
    model: ModelConfig, rows: int, mesh: Mapping[str, int], slices: int = 1, parts: int = 1
) -> dict[str, float]:
    """Bytes that a chip receives in one step of fully sharded training, by kind, in the compute dtype.

    Every layer's matrices are gathered for the forward and again for the backward pass and their gradients are
    scattered once; embedding and output projection are gathered and scattered once; what is left of gradients is
    summed over `data`. Under `tensor` the activations are summed twice in each direction, under `sequence` queries,
    keys, values and results are exchanged.

    Args:
      model: its vocabulary size set.
      rows: of a batch.
      mesh: sizes of the four axes.
      slices: that `data` goes over.
      parts: `accumulate_steps`.
    """
    width = 2 if model.dtype == "bfloat16" else 4
    data, fsdp, sequence, tensor = (mesh[axis] for axis in ("data", "fsdp", "sequence", "tensor"))
    layers = width * model.num_layers * sum(math.prod(shape) for shape in layer_matrices(model)) / tensor
    ends = width * (1 if model.tie_embeddings else 2) * model.vocabulary_size * model.hidden_size / tensor
    share = (fsdp - 1) / fsdp
    found = {
        "all-gather": parts * (2 * layers + ends) * share,
        "reduce-scatter": parts * (layers + ends) * share,
        "all-reduce": 0.0,
        "all-to-all": 0.0,
        BETWEEN_SLICES: 0.0,
    }
    gradients = (layers + ends) / fsdp
    within = data // slices
    # Sums over the length's devices are of whole parts of matrices.
    found["all-reduce"] += 2 * gradients * ((within - 1) / within + (sequence - 1) / sequence)
    found[BETWEEN_SLICES] += 2 * gradients / within * (slices - 1) / slices
    tokens = rows * model.context / (data * fsdp * sequence)  # on a chip, all parts together
    activations = width * tokens * model.hidden_size
    found["all-reduce"] += model.num_layers * 4 * 2 * activations * (tensor - 1) / tensor
    exchanged = (2 + 2 * model.kv_heads / model.num_heads) * activations / tensor
    found["all-to-all"] += model.num_layers * 2 * exchanged * (sequence - 1) / sequence
    return {kind: size for kind, size in found.items() if size}


def layer_matrices(model: ModelConfig) -> list[tuple[int, int]]:
    """Shapes of one layer's matrices, heads and their sizes as one dimension."""
    D, F = model.hidden_size, model.mlp_size
    heads, kv_heads = model.num_heads * model.head_dim, model.kv_heads * model.head_dim
    return [(D, heads), (D, kv_heads), (D, kv_heads), (heads, D), (D, F), (D, F), (F, D)]


def weights_of(model: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes that a matrix of the model may have in a program: as it is, transposed, and with heads apart."""
    V, D, H, K, d = (
        model.vocabulary_size, model.hidden_size, model.num_heads, model.kv_heads, model.head_dim
    )  # fmt: skip
    found = [*layer_matrices(model), (V, D), (D, H, d), (D, K, d), (H, d, D)]
    turned = [tuple(reversed(shape)) for shape in found]
    return list(dict.fromkeys([*found, *turned]))
