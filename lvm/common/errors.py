"""Errors that a user can fix, and exit codes."""

# Supervisors restart a run on 1, 75, 76, 77 and signals; never on 2 or 65.
EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 65
EXIT_PREEMPTED = 75
EXIT_STALLED = 76
EXIT_ALONE = 77  # the other processes of the run never joined
FINAL = (EXIT_DONE, EXIT_BAD_INPUT, EXIT_DIVERGED)


class UserError(Exception):
    """Bad configuration or input. Commands print the message as one line, without a traceback, and exit with 2.

    The message names the file, key or shape, the offending value, and what would be right.
    """


class DivergedError(Exception):
    """Training produced a non-finite loss or gradient. Commands exit with `EXIT_DIVERGED`."""
