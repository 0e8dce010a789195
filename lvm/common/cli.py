"""The command line of one command: its flags, errors as one line, exit codes."""

import errno
import os
import re
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from lvm.common import errors, logging
from lvm.common.child_process import end_with_parent
from lvm.common.commands import discard_output, exit_process, prepare_output, print_help, report_error
from lvm.common.config import expand_home, find_config
from lvm.common.jax_settings import device_problem, pin_settings

__all__ = ["PARENT", "Args", "Flags", "exit_process", "positionals_to_flags", "read_config", "spread_list_flags"]

PARENT = "LVM_PARENT"  # environment variable: the command is killed when the process of this ID ends
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
_PATH = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}

_EVERY = ("flagfile", "undefok", "help", "h", "quiet", "verbose", "v")
Args = absl_flags.FlagValues  # parsed flags: `args.workdir`, `args["workdir"].present`


class Flags:
    """Flags of one command, defined in its `main`; `run` parses them and runs the command.

    `usage` is the module docstring, for `--help`; `positionals` are flags that may be given by position, in order.
    """

    def __init__(self, usage: str | None, positionals: Sequence[str] = ()):
        self._usage, self._positionals = usage or "", positionals
        self._lists: list[str] = []
        self._has_config = False
        self._values = absl_flags.FlagValues()
        self.boolean("help", False, "print this help", short_name="h")
        self.boolean("quiet", False, "log warnings and errors only")
        self.boolean("verbose", False, "log debug messages, and what libraries log", short_name="v")

    def names(self) -> list[str]:
        """The flags defined so far, besides those of every command."""
        return [name for name in self._values if name not in _EVERY]

    def string(self, name: str, default: str | None, help: str, **options: Any) -> None:
        absl_flags.DEFINE_string(name, default, help, flag_values=self._values, **options)

    def strings(self, name: str, help: str) -> None:
        """A list: `--name a b c`, up to the next flag, or `--name=a --name=b`."""
        self._lists.append(name)
        absl_flags.DEFINE_multi_string(name, [], help, flag_values=self._values)

    def multi_string(self, name: str, help: str) -> None:
        """A list, one value each time the flag is given."""
        absl_flags.DEFINE_multi_string(name, [], help, flag_values=self._values)

    def comma_list(self, name: str, default: Sequence[str], help: str) -> None:
        """A list in one value: `--name=a,b,c`."""
        absl_flags.DEFINE_list(name, list(default), help, flag_values=self._values)

    def integer(self, name: str, default: int | None, help: str, **options: Any) -> None:
        absl_flags.DEFINE_integer(name, default, help, flag_values=self._values, **options)

    def float(self, name: str, default: float | None, help: str, **options: Any) -> None:
        absl_flags.DEFINE_float(name, default, help, flag_values=self._values, **options)

    def boolean(self, name: str, default: bool, help: str, **options: Any) -> None:
        absl_flags.DEFINE_boolean(name, default, help, flag_values=self._values, **options)

    def enum(self, name: str, default: str | None, choices: Sequence[str], help: str, **options: Any) -> None:
        absl_flags.DEFINE_enum(name, default, choices, help, flag_values=self._values, **options)

    def config(self) -> None:
        """`--config=FILE.py`, required, and `--config.KEY=VALUE` for every key of it."""
        self._has_config = True

    def run(self, body: Callable[[Args], int | None], argv: Sequence[str] | None = None) -> int:
        """Parses `argv` (default: this process's arguments), runs `body` and returns its exit code.

        An error that the user can mend is printed to stderr as one line and becomes an exit code (`errors`); any other
        exception is raised.
        """
        _end_with_parent()
        prepare_output()
        argv = list(sys.argv[1:] if argv is None else argv)
        try:
            if not self._parse(argv):
                print_help(self._help())
                return errors.EXIT_DONE
        except Exception as error:  # a config file may raise anything
            return report_error(_flag_problem(error), errors.EXIT_BAD_INPUT)
        except KeyboardInterrupt:  # while a config file imports libraries
            return report_error("interrupted", errors.EXIT_INTERRUPTED)
        logging.configure(self._values.quiet, self._values.verbose)
        pin_settings()
        return _guarded(lambda: body(self._values))

    def _help(self) -> str:
        defined = {flag.name: flag for flag in map(self._values.__getitem__, self._values)}
        lines = [
            f"  --{name}: {flag.help}" + ("" if flag.default in (None, "", []) else f" (default: {flag.default})")
            for name, flag in sorted(defined.items())
            if name not in ("flagfile", "undefok")  # absl's own
        ]
        if self._has_config:
            lines.append("  --config.KEY=VALUE: sets any key of the config")
        return "\n".join([self._usage.strip(), "", "Flags:", *lines])

    def _parse(self, argv: list[str]) -> bool:
        """Parses the flags; False where help is asked for instead."""
        values = self._values
        if self._has_config:
            argv = _with_config_path(argv)
            # Overrides such as --config.seed=1 become flags of their own, found in `sys_argv`.
            config_flags.DEFINE_config_file(
                "config", None, "config file", flag_values=values, lock_config=True, sys_argv=["", *argv]
            )
        if any(argument in ("--help", "-h") for argument in argv):
            return False
        if self._has_config:
            absl_flags.mark_flag_as_required("config", values)
        argv = spread_list_flags(argv, self._lists)
        rest = values(["", *positionals_to_flags(argv, self._positionals, values)])
        if len(rest) > 1:
            raise errors.UserError(f"unexpected argument {rest[1]!r}; flags are --name=value")
        for name in [name for name in values if not name.startswith("config.")]:
            value = values[name].value
            if isinstance(value, str):
                values[name].value = expand_home(value)
            elif isinstance(value, list):
                values[name].value = [expand_home(item) for item in value]
        if self._has_config:
            values.config.to_dict()  # ml_collections raises a config file's errors when it is used
        return True


def read_config(arguments: Sequence[str]) -> ConfigDict:
    """The config of `--config=FILE --config.KEY=VALUE …`, as a command would read it.

    Raises:
      UserError: no such file or key, or a value of another type.
    """
    flags = Flags(None)
    flags.config()
    try:
        flags._parse([*arguments])
    except Exception as error:  # a config file may raise anything
        raise errors.UserError(_flag_problem(error)) from error
    return flags._values.config


def spread_list_flags(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """`--pairs a b --out=c` → `--pairs=a --pairs=b --out=c`, for the named flags."""
    spread, current = [], None
    for argument in argv:
        if argument in ("-h", "-v"):
            current = None
            spread.append(argument)
        elif argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            current = name if name in names else None
            if current is None or value:
                spread.append(argument)
        elif current is not None:
            spread.append(f"--{current}={argument}")
        else:
            spread.append(argument)
    return spread


def positionals_to_flags(argv: Sequence[str], names: Sequence[str], values: Args) -> list[str]:
    """`A B --to=c` → `--src=A --dst=B --to=c`, for the names src and dst of flags defined in `values`."""
    left = iter(names)
    named, previous = [], ""
    for argument in argv:
        is_value = argument.startswith("-") or _takes_value(previous, values)
        name = None if is_value else next(left, None)
        named.append(f"--{name}={argument}" if name else argument)
        previous = argument
    return named


def _with_config_path(argv: Sequence[str]) -> list[str]:
    """`--config FILE` as `--config=FILE`, with the file's path as `find_config` gives it."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] == "--config":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    for i, argument in enumerate(joined):
        name, _, path = argument.partition("=")
        if name == "--config":
            path, colon, parameter = path.partition(":")
            path = find_config(path)
            if not os.path.isfile(path):
                advice = '; ":" begins a parameter of the config: rename the path that has it' if colon else ""
                raise errors.UserError(f"--config={path}: no such file{advice}")
            joined[i] = f"--config={path}{colon}{parameter}"
    return joined


def _takes_value(argument: str, values: Args) -> bool:
    name = argument.lstrip("-")
    return argument.startswith("-") and name in values and not values[name].boolean


def _guarded(body: Callable[[], int | None]) -> int:
    try:
        return body() or errors.EXIT_DONE
    except SystemExit as error:
        if isinstance(error.code, str):
            return report_error(error.code, errors.EXIT_ERROR)
        return int(error.code or errors.EXIT_DONE)
    except errors.UserError as error:
        return report_error(str(error), errors.EXIT_BAD_INPUT)
    except errors.DivergedError as error:
        return report_error(str(error), errors.EXIT_DIVERGED)
    except KeyboardInterrupt:
        return report_error("interrupted", errors.EXIT_INTERRUPTED)
    except BrokenPipeError:  # whoever reads the output has enough of it
        discard_output()
        return errors.EXIT_ERROR
    except Exception as error:
        message, code = _explain(error)
        if not message:
            raise
        return report_error(message, code)


def _explain(error: Exception) -> tuple[str, int]:
    """The line and the exit code of an error of the machine, its disk or its devices; ("", 1) for any other."""
    if isinstance(error, OSError) and error.errno in _DISK | _PATH:
        where = f": {error.filename}" if error.filename else ""
        code = errors.EXIT_BAD_INPUT if error.errno in _PATH else errors.EXIT_ERROR
        return f"{error.strerror or error}{where}", code
    if os.strerror(errno.EMFILE) in str(error):  # libraries raise types of their own
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"too many open files: this process may open {limit}; raise ulimit -n", errors.EXIT_ERROR
    if (isinstance(error, AssertionError) and not error.args) or "Unable to initialize backend" in str(error):
        is_busy = bool(error.args) and "known backends" not in str(error)  # a restart may find it free
        return device_problem(), errors.EXIT_ERROR if is_busy else errors.EXIT_BAD_INPUT
    return str(error) if isinstance(error, errors.UnavailableError) else "", errors.EXIT_ERROR


def _end_with_parent() -> None:
    if parent := os.environ.pop(PARENT, ""):
        end_with_parent(int(parent))


def _flag_problem(error: Exception) -> str:
    # Absl's own messages name the flag; those of a config file's exceptions say little without the type.
    key = error.args[0] if isinstance(error, AttributeError) and error.args else error
    if isinstance(key, KeyError) and key.args:  # ml_collections: a key that the config doesn't have
        name, _, advice = str(key.args[0]).partition("\n")
        return f"--config: no such key: {name}" + (f"; {advice[0].lower()}{advice[1:]}" if advice else "")
    message = " ".join(str(error).split())
    missing = re.findall(r"flag --(\w+)=None: Flag --\1 must have a value other than None\.", message)
    if missing and message.count("flag --") == len(missing):
        return " and ".join(f"--{name}" for name in missing) + (" is missing" if len(missing) == 1 else " are missing")
    known = (absl_flags.Error, AttributeError, KeyError, OSError, errors.UserError)
    return message if isinstance(error, known) else f"--config: {type(error).__name__}: {message}"
