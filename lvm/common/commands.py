"""`lvm COMMAND …`: finds, lists and runs the commands of a package. Imports nothing heavy: `--help` is quick."""

import ast
import importlib
import io
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import lvm
from lvm.common import errors


def exit_process(code: int) -> NoReturn:
    """Ends the process. After a failure it doesn't wait for threads that write checkpoints or read ahead.

    A preempted run ends like a finished one: leases are released and the other processes told.
    """
    if code in (errors.EXIT_DONE, errors.EXIT_PREEMPTED):
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare_output() -> None:
    """Makes stdout take any text, in an ASCII locale too, and keep the order of lines of processes with one pipe."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")


def print_help(text: str) -> None:
    """Prints text of which whoever reads it may have enough before its end, as `lvm --help | head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_output()


def discard_output() -> None:
    """Discards what is still written to stdout, whose reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def dispatch(package: str, argv: Sequence[str] | None = None) -> int:
    """`PROGRAM COMMAND …`: runs `main` of the module COMMAND of `package`, or lists its commands."""
    prepare_output()
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = list_commands(package)
    if not argv or argv[0] in ("help", "-h", "--help"):
        width = max(map(len, commands))
        program = "lvm" if package == "lvm" else f"python -m {package}"
        lines = (f"  {name:{width}}  {summary}" for name, summary in commands.items())
        print_help("\n".join([f"usage: {program} COMMAND --help\n\nCommands:", *lines]))
        return errors.EXIT_DONE
    if argv[0] == "--version":
        print(lvm.__version__)
        return errors.EXIT_DONE
    if argv[0] not in commands:
        return report_error(f"no command {argv[0]!r}; one of {', '.join(commands)}", errors.EXIT_BAD_INPUT)
    try:
        module = importlib.import_module(f"{package}.{argv[0].replace('-', '_')}")
    except KeyboardInterrupt:  # while libraries are imported, for seconds
        return report_error("interrupted", errors.EXIT_INTERRUPTED)
    return int(module.main(argv[1:]))


def list_commands(package: str) -> dict[str, str]:
    """Commands of a package with their one-line summaries: its modules that define `main`, read but not imported."""
    commands = {}
    for path in sorted(pathlib.Path(importlib.import_module(package).__path__[0]).glob("[!_]*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            commands[path.stem.replace("_", "-")] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return commands


def report_error(message: str, code: int) -> int:
    """Prints one line to stderr and returns `code`."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code
