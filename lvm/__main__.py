"""`python -m lvm COMMAND …`: the commands of this package."""

from typing import NoReturn

from lvm.common.commands import dispatch, exit_process


def main() -> NoReturn:
    """Runs a command and ends the process with its exit code."""
    exit_process(dispatch("lvm"))


if __name__ == "__main__":
    main()
