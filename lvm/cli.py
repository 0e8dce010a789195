"""What every command shares: flags, errors as one line, exit codes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from lvm import errors

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}


def run(main: Callable[[], None], list_flags: Sequence[str] = ()) -> None:
    """Parses the command line, runs `main` and exits with the project's codes.

    Args:
      main: the command; reads its flags from `absl.flags.FLAGS`.
      list_flags: names of flags that take all values up to the next flag.
    """
    logging.set_verbosity(logging.ERROR)  # the libraries' warnings are not about the user's run

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(spread_list_flags(argv, list_flags))
        except (
            flags.Error,
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            OSError,
            errors.UserError,
        ) as error:
            _fail(_flag_problem(error), errors.EXIT_BAD_INPUT)
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}; flags are --name=value", errors.EXIT_BAD_INPUT)
        return rest

    app.run(lambda _: _guarded(main), flags_parser=parse, argv=sys.argv)


def spread_list_flags(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """`--pairs a b --out=c` → `--pairs=a --pairs=b --out=c`, for the named flags."""
    spread, current = [], None
    for argument in argv:
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            current = name if name in names else None
            if current is None or value:
                spread.append(argument)
        elif current is not None:
            spread.append(f"--{current}={argument}")
        else:
            spread.append(argument)
    return spread


def _guarded(main: Callable[[], None]) -> None:
    try:
        main()
    except errors.UserError as error:
        _fail(str(error), errors.EXIT_BAD_INPUT)
    except errors.DivergedError as error:
        _fail(str(error), errors.EXIT_DIVERGED)
    except KeyboardInterrupt:
        _fail("interrupted", 128 + 2)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f": {error.filename}" if error.filename else ""
        _fail(f"{error.strerror or error}{where}", errors.EXIT_ERROR)


def _flag_problem(error: Exception) -> str:
    # Absl's own messages name the flag; those of ml_collections come with a traceback's worth of context.
    return " ".join(str(error).split())


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Threads that write checkpoints or read ahead must not hold up a run that has ended.
    os._exit(code)
