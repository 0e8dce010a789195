"""`lvm COMMAND …`: the commands of this package."""

from typing import NoReturn

from lvm.common import commands


def main() -> NoReturn:
    """Runs a command and ends the process with its exit code."""
    commands.exit_process(commands.dispatch("lvm"))


if __name__ == "__main__":
    main()
