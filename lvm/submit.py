"""Runs training under supervision: `python -m lvm.submit --on=local --processes=2 --config=FILE --workdir=DIR`.

Everything that begins with `--config` goes to `lvm.train` as it is.
"""

from __future__ import annotations

import sys

from absl import flags

from lvm import cli
from lvm.errors import UserError
from lvm.launch.local import Supervisor

_ON = flags.DEFINE_enum("on", "local", ["local"], "where the run goes")
_PROCESSES = flags.DEFINE_integer("processes", 1, "processes of the run", lower_bound=1)
_MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts", 3, "times that a failed run is started again", lower_bound=0
)
_GRACE = flags.DEFINE_float(
    "grace", 60.0, "seconds for the rest to end after one process failed", lower_bound=0.0
)
_WORKDIR = flags.DEFINE_string("workdir", None, "where the run lives", required=True)


def main(job: list[str]) -> None:
    """The command."""
    if not any(argument.partition("=")[0] == "--config" for argument in job):
        raise UserError("--config: not given; it names the experiment's file")
    command = ["-m", "lvm.train", f"--workdir={_WORKDIR.value}", *job]
    code = Supervisor(command, _PROCESSES.value, _MAX_RESTARTS.value, _GRACE.value).run()
    if code:
        sys.exit(code)


if __name__ == "__main__":
    JOB = [argument for argument in sys.argv[1:] if argument.startswith("--config")]
    sys.argv = [argument for argument in sys.argv if argument not in JOB]
    cli.run(lambda: main(JOB))
