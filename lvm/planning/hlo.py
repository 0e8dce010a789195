"""Reads the text of a compiled program: which instructions run, and how often.

XLA's own cost analysis counts the body of a loop once; a step of a scanned model is little else than such bodies.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0}  # the others have their bits in their name
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """What an instruction gives, or one part of it.

    Attributes:
      dtype: as XLA names it.
      shape: sizes.
      layout: order, tiles and memory space.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> int:
        """Its size without the padding of tiles."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            found = re.search(r"\d+", self.dtype)
            bits = int(found[0]) if found else 0
        return math.prod(self.shape) * bits // 8

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the device's main memory: `S(1)` and on are the memories on the chip."""
        return not re.search(r"S\([1-9]\d*\)", self.layout)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    operation: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str  # what stands in the parentheses
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    def called(self, role: str) -> str | None:
        """The computation that it calls as `body`, `condition`, `calls` …"""
        return dict(_CALLED.findall(self.attributes)).get(role)

    def attribute(self, name: str) -> str:
        """The value of `name="value"` among its attributes; "" where there is none."""
        found = re.search(rf'\b{name}="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]  # by name, in the order in which they run


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction, where it stands, and how often it runs in one step.

    Attributes:
      computation: the one it stands in.
      scope: name of the nearest computation around it that isn't fused.
      fused: whether it stands inside a fusion.
      times: how often.
    """

    instruction: Instruction
    computation: Computation
    scope: str
    fused: bool
    times: int


class Program:
    """A compiled program.

    Args:
      text: `jax.stages.Compiled.as_text()`.

    Attributes:
      computations: by name.
      entry: the name of the one that runs.
      uncounted_loops: loops whose number of rounds isn't written in the program; their bodies are counted once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self.uncounted_loops: list[str] = []
        current: Computation = {}
        for line in text.splitlines():
            if line and not line[0].isspace():
                found = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
                if found and not line.startswith("HloModule"):
                    current = self.computations[found[2]] = {}
                    self.entry = found[2] if found[1] else self.entry
            elif " = " in line:
                instruction = _parse(line)
                current[instruction.name] = instruction

    def runs(self) -> Iterator[Run]:
        """Every instruction that runs, those inside fusions after the fusion."""
        yield from self._runs(self.entry, self.entry, False, 1)

    def _runs(self, name: str, scope: str, fused: bool, times: int) -> Iterator[Run]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield Run(instruction, computation, scope, fused, times)
            if instruction.operation == "while":
                rounds = self.rounds(instruction, computation)
                body = instruction.called("body") or ""
                yield from self._runs(body, body, False, times * rounds)
                continue
            if instruction.operation == "conditional":
                branches = re.findall(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                named = re.findall(r"%?([\w.\-]+)", branches[0]) if branches else []
                named += [c for r, c in _CALLED.findall(instruction.attributes) if r.endswith("_computation")]
                for branch in named:
                    yield from self._runs(branch, branch, False, times)
                continue
            role = {"fusion": "calls", "call": "to_apply", "async-start": "calls"}.get(instruction.operation)
            inner = instruction.called(role) if role else None
            if inner:
                inside = fused or role == "calls"
                yield from self._runs(inner, scope if inside else inner, inside, times)

    def rounds(self, loop: Instruction, around: Computation) -> int:
        """How often a `while` runs its body."""
        known = re.search(r'known_trip_count[^}]*?"?n"?:"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition") or ""]
        called = [i.called("calls") for i in condition.values()]
        inside = [i for name in called if name for i in self.computations[name].values()]
        limits = {int(i.literal) for i in [*condition.values(), *inside] if _is_count(i)}
        if len(limits) != 1:
            if loop.name not in self.uncounted_loops:
                self.uncounted_loops.append(loop.name)
            return 1
        return max(1, limits.pop() - self._first(loop, condition, around))

    @staticmethod
    def _first(loop: Instruction, condition: Computation, around: Computation) -> int:
        """Where a loop's count begins: 0, but for loops of which the compiler took the first rounds out."""
        indices = [
            re.search(r"index=(\d+)", i.attributes) for i in condition.values() if i.arrays == (_COUNT,)
        ]
        begun = around.get(loop.operands[0]) if loop.operands else None
        for index in indices:
            if index and begun and begun.operation == "tuple":
                value = around.get(begun.operands[int(index[1])])
                return int(value.literal) if value and _is_count(value) else 0
        return 0


_COUNT = Array("s32", ())


def _is_count(instruction: Instruction) -> bool:
    plain = tuple(dataclasses.replace(array, layout="") for array in instruction.arrays)
    return instruction.operation == "constant" and plain == (_COUNT,) and instruction.literal.isdigit()


def _parse(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    right = re.sub(r"/\*.*?\*/", "", right)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    arrays = tuple(
        Array(dtype, tuple(int(d) for d in shape.split(",") if d), layout)
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
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"no closing parenthesis: {text[:80]}")
