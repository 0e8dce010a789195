"""Forks a process for each command that it is told: `python -m tests.prefork`, JSON on stdin and stdout.

A short command spends most of its time on importing JAX and what belongs to it. This process has done that once, and
has started no device and no thread, so a fork of it is where a fresh `python -m MODULE` would be after its imports.
"""

import json
import os
import runpy
import signal
import sys

import flax.nnx  # noqa: F401
import grain  # noqa: F401
import jax  # noqa: F401
import matplotlib  # noqa: F401
import optax  # noqa: F401
import orbax.checkpoint  # noqa: F401
import scipy.ndimage  # noqa: F401
import tensorboardX  # noqa: F401

import lvm  # noqa: F401
import tokenizer  # noqa: F401


def become(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """Runs `python -m` with these arguments, as this process; `output` takes what it prints."""
    signal.alarm(300)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, stream in enumerate((os.open(os.devnull, os.O_RDONLY), file, file)):
        os.dup2(stream, number)
    sys.argv = ["", *arguments[1:]]
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def main() -> None:
    """Answers each line of stdin with the exit code of the command in it."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            become(**request)
            return  # at the child's end, as a program's
        _, status = os.waitpid(pid, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    main()
