"""The errors that a user can mend, and the exit codes of every command."""

from __future__ import annotations

# Supervisors restart a run on 1, 75, 76 and signals; never on 2 or 65.
EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 65
EXIT_PREEMPTED = 75
EXIT_STALLED = 76
FINAL = (EXIT_DONE, EXIT_BAD_INPUT, EXIT_DIVERGED)


class UserError(Exception):
    """A bad configuration or bad input.

    The message names the file, key or shape, what was found, and what would be right. Commands print it
    as one line and exit with `EXIT_BAD_INPUT`, without a traceback.
    """


class DivergedError(Exception):
    """Training produced a loss or a gradient that is not finite. Commands exit with `EXIT_DIVERGED`."""
