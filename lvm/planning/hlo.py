"""Parser for compiled HLO text: the instructions that run in one step, with the trip counts of their loops.

XLA's cost analysis counts a loop body once, and a scanned model's step is little else than loop bodies. The text is
parsed because jaxlib's `HloModule` bindings expose neither shapes nor attributes.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0}  # other dtypes have their width in their name
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALL_ROLES = {"fusion": "calls", "call": "to_apply", "async-start": "calls"}


@dataclasses.dataclass(frozen=True)
class HloArray:
    """Result of an instruction, or one element of a tuple result; `layout` has order, tiles and memory space."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> int:
        """Size without tile padding."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return math.prod(self.shape) * bits // 8

    @property
    def in_hbm(self) -> bool:
        """True unless the layout names an on-chip memory space, `S(1)` or higher."""
        return not re.search(r"S\([1-9]\d*\)", self.layout)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `literal` is the text in parentheses: operands, a constant, a parameter's index."""

    name: str
    operation: str
    arrays: tuple[HloArray, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> int:
        return sum(array.bytes for array in self.arrays if array.in_hbm)

    @property
    def tuple_index(self) -> int | None:
        """`index` of a get-tuple-element."""
        match = re.search(r"index=(\d+)", self.attributes)
        return int(match[1]) if match else None

    @property
    def branches(self) -> list[str]:
        """Computations of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if listed:
            return re.findall(r"[\w.\-]+", listed[1])
        return [name for role, name in _CALLED.findall(self.attributes) if role.endswith("_computation")]

    def called(self, role: str) -> str:
        """Name of the computation called as `body`, `condition`, `calls` …; "" if there is none."""
        return dict(_CALLED.findall(self.attributes)).get(role, "")

    def attribute(self, name: str) -> str:
        """Value of `name="value"` among the attributes; "" if absent."""
        match = re.search(rf'\b{name}="([^"]*)"', self.attributes)
        return match[1] if match else ""


class Computation(dict[str, Instruction]):
    """Instructions by name, in execution order."""

    @property
    def root(self) -> Instruction:
        return next(i for i in self.values() if i.is_root)

    def parameter(self, index: int) -> Instruction:
        return next(i for i in self.values() if i.operation == "parameter" and i.literal == str(index))


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction of a computation, which runs `count` times per step.

    `scope` is the name of the nearest enclosing computation that is not fused; `fused` is True inside a fusion.
    """

    instruction: Instruction
    computation: Computation
    scope: str
    fused: bool
    count: int


class Program:
    """A compiled program, parsed from `jax.stages.Compiled.as_text()`.

    Attributes:
      computations: by name; `entry` is the name of the first to run.
      unknown_trip_counts: loops whose trip count is not in the program; their bodies count once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self.unknown_trip_counts: list[str] = []
        current = Computation()
        for line in text.splitlines():
            if line and not line[0].isspace():
                header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
                if header and not line.startswith("HloModule"):
                    current = self.computations[header[2]] = Computation()
                    self.entry = header[2] if header[1] else self.entry
            elif " = " in line:
                instruction = _parse(line)
                current[instruction.name] = instruction

    def executions(self) -> Iterator[Execution]:
        """Every instruction that runs; those inside a fusion follow the fusion."""
        yield from self._executions(self.entry, self.entry, False, 1)

    def _executions(self, name: str, scope: str, fused: bool, count: int) -> Iterator[Execution]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield Execution(instruction, computation, scope, fused, count)
            operation = instruction.operation
            if operation == "while":
                body, trips = instruction.called("body"), self.trip_count(instruction, computation)
                yield from self._executions(body, body, False, count * trips)
            elif operation == "conditional":
                for branch in instruction.branches:
                    yield from self._executions(branch, branch, False, count)
            elif callee := instruction.called(_CALL_ROLES.get(operation, "")):
                inside = fused or operation != "call"
                yield from self._executions(callee, scope if inside else callee, inside, count)

    def trip_count(self, loop: Instruction, caller: Computation) -> int:
        """Iterations of a `while` in the computation `caller`."""
        known = re.search(r'known_trip_count[^}]*?"?n"?:"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        fused = [i for call in condition.values() for i in self.computations.get(call.called("calls"), {}).values()]
        limits = {int(i.literal) for i in [*condition.values(), *fused] if _is_count(i)}
        if len(limits) != 1:
            if loop.name not in self.unknown_trip_counts:
                self.unknown_trip_counts.append(loop.name)
            return 1
        return max(1, limits.pop() - _initial_count(loop, condition, caller))


_COUNT = HloArray("s32", ())


def _initial_count(loop: Instruction, condition: Computation, caller: Computation) -> int:
    """First value of the loop counter: above 0 where the compiler has peeled iterations."""
    init = caller.get(loop.operands[0]) if loop.operands else None
    for instruction in condition.values():
        index = instruction.tuple_index if instruction.arrays == (_COUNT,) else None
        if index is not None and init and init.operation == "tuple":
            value = caller.get(init.operands[index])
            return int(value.literal) if value and _is_count(value) else 0
    return 0


def _is_count(instruction: Instruction) -> bool:
    plain = tuple(dataclasses.replace(array, layout="") for array in instruction.arrays)
    return instruction.operation == "constant" and plain == (_COUNT,) and instruction.literal.isdigit()


def _parse(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    right = re.sub(r"/\*.*?\*/", "", right)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    arrays = tuple(
        HloArray(dtype, tuple(int(d) for d in shape.split(",") if d), layout)
        for dtype, shape, layout in _ARRAY.findall(right[:end])
    )
    rest = right[end:].lstrip()
    start = rest.index("(")
    close = _closing(rest, start)
    literal = rest[start + 1 : close]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        operation=rest[:start],
        arrays=arrays,
        operands=tuple(re.findall(r"%([\w.\-]+)", literal)),
        literal=literal,
        attributes=rest[close + 1 :],
        is_root=left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"no closing parenthesis: {text[:80]}")
