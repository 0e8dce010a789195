"""What every command shares: flags, errors as one line, exit codes."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from lvm.common import errors

PARENT = "LVM_PARENT"  # environment variable: a command ends with the process of that number
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
_PATH = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


def run(main: Callable[[], None], list_flags: Sequence[str] = ()) -> None:
    """Parses the command line, runs `main` and exits with the project's codes.

    Args:
      main: the command; reads its flags from `absl.flags.FLAGS`.
      list_flags: names of flags that take all values up to the next flag.
    """
    _end_with_parent()
    # What the libraries log is not about the user's run; what matters of it comes back as an exception.
    logging.set_verbosity(logging.FATAL)

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(spread_list_flags(argv, list_flags))
            _check_config()
        except Exception as error:  # a config file may raise anything
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


def positionals_to_flags(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """`A B --to=c` → `--src=A --dst=B --to=c`, for the names src and dst: commands take flags alone.

    Flags must be defined: one that isn't a switch may have its value as the next argument.
    """
    left = iter(names)
    named, before = [argv[0]], ""
    for argument in argv[1:]:
        is_value = argument.startswith("-") or _wants_value(before)
        name = None if is_value else next(left, None)
        named.append(f"--{name}={argument}" if name else argument)
        before = argument
    return named


def _wants_value(argument: str) -> bool:
    name = argument.lstrip("-")
    return argument.startswith("-") and name in flags.FLAGS and not flags.FLAGS[name].boolean


def _guarded(main: Callable[[], None]) -> None:
    try:
        main()
    except errors.UserError as error:
        _fail(str(error), errors.EXIT_BAD_INPUT)
    except errors.DivergedError as error:
        _fail(str(error), errors.EXIT_DIVERGED)
    except KeyboardInterrupt:
        _fail("interrupted", 128 + 2)
    except BrokenPipeError:  # whoever reads the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(errors.EXIT_ERROR)
    except OSError as error:
        if error.errno not in _DISK | _PATH:
            raise
        where = f": {error.filename}" if error.filename else ""
        code = errors.EXIT_BAD_INPUT if error.errno in _PATH else errors.EXIT_ERROR
        _fail(f"{error.strerror or error}{where}", code)


def _check_config() -> None:
    # A config file that is missing or fails is kept by ml_collections as a value that raises when it is used.
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    if config is not None:
        config.to_dict()


def _end_with_parent() -> None:
    parent = os.environ.pop(PARENT, "")
    if parent and sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != int(parent):  # it ended before the signal was asked for
            os._exit(errors.EXIT_ERROR)


def _flag_problem(error: Exception) -> str:
    # Absl's own messages name the flag; what a config file raises says little without its type.
    key = error.args[0] if isinstance(error, AttributeError) and error.args else error
    if isinstance(key, KeyError) and key.args:  # a config's words for a key that it doesn't have
        name, _, advice = str(key.args[0]).partition("\n")
        return f"--config: no such key: {name}" + (f"; {advice[0].lower()}{advice[1:]}" if advice else "")
    message = " ".join(str(error).split())
    known = (flags.Error, AttributeError, KeyError, OSError, errors.UserError)
    return message if isinstance(error, known) else f"--config: {type(error).__name__}: {message}"


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Threads that write checkpoints or read ahead must not hold up a run that has ended.
    os._exit(code)
