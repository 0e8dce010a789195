"""Errors that a user can fix, and exit codes."""

import errno
import signal

# Supervisors restart a run on 1, 75, 76, 77 and signals; never on 2 or 65.
EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 65
EXIT_PREEMPTED = 75
EXIT_STALLED = 76
EXIT_ALONE = 77  # the other processes of the run never joined
EXIT_INTERRUPTED = 128 + signal.SIGINT
FINAL = (EXIT_DONE, EXIT_BAD_INPUT, EXIT_DIVERGED)

_UNAVAILABLE = {  # errors of the process, of disks of copies and of networks' file systems: any file would fail alike
    errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ENOSPC, errno.EDQUOT,
}  # fmt: skip


class UserError(Exception):
    """Bad configuration or input. Commands print the message as one line, without a traceback, and exit with 2.

    The message names the file, key or shape, the offending value, and what would be right.
    """


class UnavailableError(Exception):
    """A storage, or a resource of the machine, that does not answer now: no fault of the file that was to be read.

    Commands print one line and exit with 1, so that a supervisor starts them again.
    """


class DivergedError(Exception):
    """Training produced a non-finite loss or gradient. Commands exit with `EXIT_DIVERGED`."""


def check_available(error: BaseException) -> None:
    """Raises UnavailableError for an error that is no fault of the file that was to be read."""
    if isinstance(error, OSError) and error.errno in _UNAVAILABLE:
        raise UnavailableError(" ".join(str(error).split())) from error
