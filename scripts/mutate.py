"""Plant faults in modules, one at a time in a copy of the checkout, and list those that no test notices.

python -m scripts.mutate --modules lvm/model lvm/training/losses.py --faults=50 --out=faults.jsonl

A fault is tried on the tests of its module (`test_MODULE*.py` of the mirrored folder and all that import it) and, if
they pass, on the rest of that folder and on `--also`. A rerun with the same `--out` leaves out the faults in it.
"""

import ast
import collections
import copy
import itertools
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from lvm.common import cli
from lvm.common.errors import UserError

_PAIRS = (
    "Add Sub", "Mult Div", "BitAnd BitOr", "Lt LtE", "Gt GtE", "Eq NotEq", "In NotIn", "Is IsNot", "And Or",
    "FloorDiv Mod", "RShift LShift", "sum mean", "min max", "minimum maximum", "any all", "argmin argmax",
    "floor ceil", "zeros ones", "exp log", "cos sin", "psum pmean",
)  # fmt: skip
_SWAPS = {a: b for pair in _PAIRS for a, b in (pair.split()[::-1], pair.split())}
_NOT_CODE = (ast.JoinedStr, ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)
_NO_TESTS = 5  # exit code of pytest
_BASELINE_TIMEOUT_S = 3600
Fault = collections.namedtuple("Fault", "path line kind start end before after")  # of the bytes [start, end)


def find_faults(path: str, source: str) -> list[Fault]:
    """All faults that can be planted in a module: none in messages, annotations, decorators, logging and `main`."""
    tree, content, faults = ast.parse(source), source.encode(), {}
    offsets = [0, *itertools.accumulate(len(line) for line in content.splitlines(keepends=True))]
    imports = {alias.asname or alias.name.split(".")[0] for n in ast.walk(tree) for alias in getattr(n, "names", ())
               if isinstance(alias, ast.alias)}  # fmt: skip
    for kind, old, new in itertools.chain.from_iterable(_variants(node, imports) for node in _code(tree)):
        start, end = offsets[old.lineno - 1] + old.col_offset, offsets[old.end_lineno - 1] + old.end_col_offset
        if ast.unparse(new) == ast.unparse(old):
            continue  # an operator without a counterpart
        after = ast.unparse(new) if isinstance(new, ast.stmt) else f"({ast.unparse(new)})"
        faults[start, end, after] = Fault(path, old.lineno, kind, start, end, content[start:end].decode(), after)
    return list(faults.values())


def _code(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, _NOT_CODE) or getattr(node, "name", "") == "main" or ast.unparse(node).startswith("log_"):
        return
    yield node
    node = node.value if isinstance(node, ast.Expr) else node  # a call for its effect is deleted, not unwrapped
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                yield from _code(child) if isinstance(child, ast.AST) else ()


def _variants(node: ast.AST, imports: set[str]) -> Iterator[tuple[str, Any, ast.AST]]:
    """Kind, node to replace and replacement of the faults at a node."""

    def changed(**fields: Any) -> ast.AST:
        new = copy.copy(node)
        vars(new).update(fields)
        return new

    def swap(operator: ast.AST) -> ast.AST:
        name = type(operator).__name__
        return getattr(ast, _SWAPS.get(name, name))()

    match node:
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign():
            yield "operator", node, changed(op=swap(node.op))
        case ast.Compare(ops=[operator]):
            yield "operator", node, changed(ops=[swap(operator)])
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "operator", node, operand
        case ast.Constant(value=bool() as value):
            yield "constant", node, ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield from (("constant", node, ast.Constant(other)) for other in (value + 1, value - 1, value * 2))
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield "condition", test, ast.UnaryOp(ast.Not(), test)
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in _SWAPS:
            yield "function", node, changed(**{node._fields[-2]: _SWAPS[name]})
        case ast.Assign(targets=[ast.Name(id=name)], value=value) if f"id='{name}'" in ast.dump(value):
            yield "statement", node, ast.Pass()
        case ast.Expr(value=ast.Call()):
            yield "statement", node, ast.Pass()
        case ast.Call(func=function, args=arguments, keywords=keywords):
            for keyword in keywords:
                yield "keyword", node, changed(keywords=[k for k in keywords if k is not keyword])
            if len(arguments) > 1:
                yield "arguments", node, changed(args=[arguments[1], arguments[0], *arguments[2:]])
            if len(arguments) == 1 and not isinstance(arguments[0], ast.Starred | ast.GeneratorExp):
                yield "call", node, arguments[0]
            if isinstance(function, ast.Attribute) and re.split(r"\W", ast.unparse(function))[0] not in imports:
                yield "call", node, function.value


def sample_faults(root: pathlib.Path, modules: Sequence[str], count: int, seed: int) -> list[Fault]:
    """A seeded sample that takes from every module and kind in turn."""
    rng, groups = random.Random(seed), collections.defaultdict(list)
    for path in sorted({p for m in modules for p in ([root / m] if m.endswith(".py") else (root / m).rglob("*.py"))}):
        for fault in find_faults(str(path.relative_to(root)), path.read_text()):
            groups[fault.path, fault.kind].append(fault)
    rounds = itertools.zip_longest(*(rng.sample(group, len(group)) for group in groups.values()))
    return [fault for row in rounds for fault in rng.sample(row, len(row)) if fault][:count]


def tests_of(root: pathlib.Path, module: str, also: Sequence[str]) -> list[list[str]]:
    """Test files that mirror or import a module, and those to try next: the rest of the mirrored folder, and `also`."""
    path = pathlib.PurePath(module.removesuffix("/__init__.py")).with_suffix("")
    imported = re.compile(rf"\b{'.'.join(path.parts)}\b|from {'.'.join(path.parts[:-1])} import .*\b{path.name}\b")
    folder = [str(p.relative_to(root)) for p in (root / "tests" / path.parent).glob("test_*.py")]
    mirror = [test for test in folder if pathlib.PurePath(test).name.startswith(f"test_{path.name}")]
    every = {str(p.relative_to(root)): p.read_text() for p in root.glob("tests/**/test_*.py")}
    near = dict.fromkeys([*sorted(mirror), *sorted(test for test in every if imported.search(every[test]))])
    return [stage for stage in (list(near), sorted({*folder, *also} - {*near})) if stage]


class Checkout:
    """A copy of the tracked files of a checkout, to plant faults in."""

    def __init__(self, source: pathlib.Path, root: pathlib.Path):
        self.root = root
        files = subprocess.run(["git", "ls-files"], cwd=source, capture_output=True, check=True, text=True).stdout
        subprocess.run(["cp", "--parents", "-t", root, *files.splitlines()], cwd=source, check=True)
        # Programs without the fault are compiled once; a fault changes its program's key.
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{root}/programs", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self._environment = {**os.environ, **cache, "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}

    def first_failure(self, fault: Fault, tests: Sequence[str], timeout_s: int) -> str:
        """The first test that fails with a fault; "" if none does."""
        path = self.root / fault.path
        content = path.read_bytes()
        path.write_bytes(content[: fault.start] + fault.after.encode() + content[fault.end :])
        try:
            return self.run(tests, timeout_s)
        finally:
            path.write_bytes(content)

    def run(self, tests: Sequence[str], timeout_s: int) -> str:
        """Runs test files; returns the first that fails, or "" if none does."""
        pytest = [sys.executable, "-m", "pytest", "-xq", "-m", "not slow and not parity", "-p", "no:cacheprovider"]
        command = ["timeout", "--signal=KILL", str(timeout_s), *pytest, *tests]
        with tempfile.TemporaryFile("w+") as output:  # a pipe would wait for processes that a killed test leaves
            code = subprocess.run(
                command, cwd=self.root, env=self._environment, stdout=output, stderr=output
            ).returncode
            output.seek(0)
            failed = [line.split()[1] for line in output if line.startswith(("FAILED ", "ERROR "))]
        return "" if code in (0, _NO_TESTS) else (*failed, f"exit code {code}")[0]


def _run(args: cli.Args) -> None:
    root, out = pathlib.Path.cwd(), pathlib.Path(args.out)
    outcomes = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    tried = {tuple(outcome["fault"]) for outcome in outcomes}
    faults = sample_faults(root, args.modules, args.faults, args.seed)[args.shard :: args.num_shards]
    with tempfile.TemporaryDirectory() as folder, out.open("a") as file:
        checkout = Checkout(root, pathlib.Path(folder))
        stages = {module: tests_of(checkout.root, module, args.also) for module in {fault.path for fault in faults}}
        every = sorted({test for tests in stages.values() for stage in tests for test in stage})
        if not outcomes and (failed := checkout.run(every, _BASELINE_TIMEOUT_S)):
            raise UserError(f"--modules: without a fault {failed} fails; mend it first")
        for fault in (fault for fault in faults if tuple(fault) not in tried):
            failures = (checkout.first_failure(fault, stage, args.timeout_s) for stage in stages[fault.path])
            outcomes.append({"fault": fault, "noticed_by": next(filter(None, failures), "")})
            print(json.dumps(outcomes[-1], ensure_ascii=False), file=file, flush=True)
    unnoticed = [Fault(*outcome["fault"]) for outcome in outcomes if not outcome["noticed_by"]]
    print("| fault | kind | code | planted |\n|---|---|---|---|")
    for fault in unnoticed:
        code = " ".join(fault.before.split())
        print(f"| {fault.path}:{fault.line} | {fault.kind} | `{code}` | `{fault.after}` |")
    print(f"{len(outcomes)} planted, {len(outcomes) - len(unnoticed)} noticed")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.strings("modules", "files and folders to plant faults in")
    flags.strings("also", "test files to try on what the tests of the module do not notice")
    flags.integer("faults", 50, "faults to sample", lower_bound=1)
    flags.integer("seed", 0, "seed of the sample")
    flags.integer("timeout_s", 300, "seconds after which tests with a fault have noticed it", lower_bound=1)
    flags.integer("shard", 0, "shard of the sample to try", lower_bound=0)
    flags.integer("num_shards", 1, "number of shards", lower_bound=1)
    flags.string("out", None, "JSON lines of the outcomes; a rerun goes on", required=True)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
