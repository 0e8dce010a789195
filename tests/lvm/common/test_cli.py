"""The command line: list flags, errors as one line, exit codes."""

import errno
import os
import subprocess
import sys

import jax
import pytest
from absl import flags as absl_flags
from hypothesis import given
from hypothesis import strategies as st

import lvm
from lvm.common import cli, commands
from lvm.common.cli import positionals_to_flags, spread_list_flags
from lvm.common.config import from_config_dict
from lvm.common.errors import UnavailableError
from lvm.training.config import TrainConfig
from tests.commands import ROOT

SCRIPT = """
import errno
from lvm.common import cli
from lvm.common.errors import DivergedError, UserError

def body(args):
    print("pairs", args.pairs)
    match args.outcome:
        case "user": raise UserError("config.x: 3 is wrong")
        case "diverged": raise DivergedError("the loss is nan")
        case "disk": raise OSError(errno.ENOSPC, "No space left on device", "/some/file")
        case "interrupt": raise KeyboardInterrupt
        case "exit": raise SystemExit(75)
        case "bug": raise RuntimeError("a bug")

flags = cli.Flags("A command.")
flags.enum("outcome", "done", ["done", "user", "diverged", "disk", "interrupt", "exit", "bug"], "how it ends")
flags.strings("pairs", "a list")
cli.exit_process(flags.run(body))
"""


def run(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["run", "--pairs", "a", "b", "--out=c"], ["run", "--pairs=a", "--pairs=b", "--out=c"]),
        (["run", "--pairs=a", "b"], ["run", "--pairs=a", "--pairs=b"]),
        (["run", "--pairs", "a=b", "-1"], ["run", "--pairs=a=b", "--pairs=-1"]),
        (["run", "--out", "c", "d"], ["run", "--out", "c", "d"]),
        (["run", "--pairs", "a", "--out", "c"], ["run", "--pairs=a", "--out", "c"]),
        (["run", "--pairs", "a", "-v"], ["run", "--pairs=a", "-v"]),
    ],
)
def test_list_flags_take_values_up_to_next_flag(argv, expected):
    assert spread_list_flags(argv, ["pairs"]) == expected


@given(st.lists(st.text()))
def test_spread_list_flags_without_lists_is_identity(argv):
    assert spread_list_flags(argv, []) == argv


def test_success_exits_0_with_list_flags_parsed():
    done = run("--pairs", "a", "b", "--outcome=done")
    assert (done.returncode, done.stdout, done.stderr) == (0, "pairs ['a', 'b']\n", "")


def test_ascii_stdout_takes_any_text():
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run("--pairs", "a→b", **ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), 1, "this process may open "),
        (ValueError("UNKNOWN: /a/b: Too many open files [source locations]"), 1, "ulimit -n"),
        (UnavailableError("gs://a/b: no answer"), 1, "gs://a/b: no answer"),
        (AssertionError(), 2, "JAX_PLATFORMS=cpu: no such device, or its plugin is not installed"),
        (RuntimeError("Unable to initialize backend 'x': not in the list of known backends"), 2, "known backends"),
        (RuntimeError("Unable to initialize backend 'tpu': already in use\nby process 7"), 1, "in use by process 7"),
    ],
)
def test_error_of_the_machine_is_one_line(error, code, words, monkeypatch, capsys):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("jax.devices", fail)
    monkeypatch.setitem(jax.config.values, "jax_platforms", "cpu")
    assert cli.Flags("").run(fail, []) == code
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert words in line
    assert line.count("\n") == 1


def test_assertion_of_ours_keeps_its_traceback():
    def fail(args):
        raise AssertionError

    with pytest.raises(AssertionError):
        cli.Flags("").run(fail, [])


def test_home_is_expanded_in_flags_and_configs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.py").write_text((ROOT / "configs" / "demo_lvm.py").read_text("utf-8"), "utf-8")
    flags, values = cli.Flags(""), []
    flags.config()
    flags.string("out", "~/default", "a folder")
    flags.strings("pairs", "a list")
    arguments = ["--config", "~/config.py", "--pairs", "~/a.png:~/b.png", "c~d", "--config.data.store=~/store"]
    assert flags.run(values.append, arguments) == 0
    assert values[0].out == f"{tmp_path}/default"
    assert values[0].pairs == [f"{tmp_path}/a.png:{tmp_path}/b.png", "c~d"]
    assert from_config_dict(TrainConfig, values[0].config).data.store == (f"{tmp_path}/store",)


@pytest.mark.parametrize(
    ("outcome", "code", "error"),
    [
        ("user", 2, "error: config.x: 3 is wrong\n"),
        ("diverged", 65, "error: the loss is nan\n"),
        ("disk", 1, "error: No space left on device: /some/file\n"),
        ("interrupt", 130, "error: interrupted\n"),
        ("exit", 75, ""),
    ],
)
def test_error_is_one_line_with_its_exit_code(outcome, code, error):
    ended = run(f"--outcome={outcome}")
    assert (ended.returncode, ended.stderr) == (code, error)
    assert ended.stdout == "pairs []\n"  # what was said before is not lost


def test_bug_keeps_traceback_and_exits_1():
    ended = run("--outcome=bug")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "a bug" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--outcme=done"], "outcme"), (["--outcome=no"], "outcome"), (["stray"], "stray")],
)
def test_bad_flag_is_one_line_that_names_it(arguments, named):
    ended = run(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert named in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["A", "B", "--number=2"],
        ["--number", "2", "A", "B"],
        ["A", "--number", "2", "B"],
        ["--number=2", "A", "B"],
        ["A", "--switch", "B", "--number", "2"],
    ],
)
def test_positionals_may_stand_anywhere(argv):
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_integer("number", 0, "", flag_values=values)
    absl_flags.DEFINE_boolean("switch", False, "", flag_values=values)
    flags = positionals_to_flags(argv, ("src", "dst"), values)
    others = ("--number", "2", "--number=2", "--switch")
    assert [flag for flag in flags if flag not in others] == ["--src=A", "--dst=B"]
    assert positionals_to_flags(["A", "B", "C"], ("src", "dst"), values)[-1] == "C"  # the parser refuses it


def test_help_prints_usage_and_every_flag(capsys):
    flags = cli.Flags("Does a thing.", positionals=("src",))
    flags.string("src", None, "input folder", required=True)
    flags.config()
    assert flags.run(lambda args: pytest.fail("ran"), ["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Does a thing."
    assert "  --src: input folder" in lines
    assert "  --config.KEY=VALUE: sets any key of the config" in lines


@pytest.mark.parametrize("spelling", [["--config=configs/demo_lvm.py"], ["--config", "configs/demo_lvm.py"]])
def test_config_flags_set_keys(spelling, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags, seeds = cli.Flags(""), []
    flags.config()
    assert flags.run(lambda args: seeds.append(args.config.seed), [*spelling, "--config.seed=7"]) == 0
    assert seeds == [7]


def test_repeated_config_flag_gives_a_tuple(monkeypatch):
    monkeypatch.chdir(ROOT)
    flags, stores = cli.Flags(""), []
    flags.config()
    repeated = ["--config.data.store=runs/a", "--config.data.store=gs://bucket/b"]
    assert (
        flags.run(lambda args: stores.append(args.config.data.store), ["--config=configs/demo_lvm.py", *repeated]) == 0
    )
    assert stores == [("runs/a", "gs://bucket/b")]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--config is missing"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (["--config=configs"], "--config=configs: no such file"),
        (["--config=configs:1/a.py"], '--config=configs: no such file; ":" begins a parameter of the config'),
        (["--config=configs/demo_lvm.py", "--config.sed=7"], "sed"),
    ],
)
def test_config_errors_name_the_key_or_file(arguments, named, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = cli.Flags("")
    flags.config()
    assert flags.run(lambda args: pytest.fail("ran"), arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("package", ["lvm", "tokenizer"])
def test_commands_are_listed_with_one_line_each(package, capsys):
    assert commands.dispatch(package, ["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {
        path.stem.replace("_", "-") for path in (ROOT / package).glob("[!_]*.py") if "\ndef main(" in path.read_text()
    }
    assert {line.split()[0] for line in lines if line.startswith("  ")} == names
    assert {"train", "convert"} <= names
    assert ("convert-store" in names) == (package == "lvm")
    assert max(map(len, lines)) <= 120


def test_commands_three_spellings_are_the_same():
    spellings = (["lvm", "inspect"], ["lvm.inspect"])  # imports little
    done = [
        subprocess.run(
            [sys.executable, "-m", *spelling, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for spelling in spellings
    ]
    assert done[0].stdout == done[1].stdout
    assert "--sheet" in done[0].stdout


def test_command_of_two_words_is_spelled_with_a_dash(capsys):
    assert commands.dispatch("lvm", ["convert-store", "--help"]) == 0
    assert "lvm convert-store OLD NEW" in capsys.readouterr().out


def test_missing_flags_are_named_together(capsys):
    flags = cli.Flags("")
    for name in ("model", "out"):
        flags.string(name, None, "", required=True)
    assert flags.run(lambda args: None, []) == 2
    assert flags.run(lambda args: None, ["--out=x"]) == 2
    assert capsys.readouterr().err == "error: --model and --out are missing\nerror: --model is missing\n"


def test_commands_start_without_slow_libraries():
    slow = "scipy.stats", "matplotlib", "tensorboardX", "torch"
    script = f"import lvm.train, tokenizer.train, sys; print([name for name in {slow} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_interrupted_import_is_one_line(capsys, monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    commands_by_name = commands.list_commands("lvm")
    monkeypatch.setattr(commands, "list_commands", lambda package: commands_by_name)
    monkeypatch.setattr(commands.importlib, "import_module", interrupt)
    assert commands.dispatch("lvm", ["train"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_unknown_command_is_one_line(capsys):
    assert commands.dispatch("lvm", ["trian"]) == 2
    assert capsys.readouterr().err.startswith("error: no command 'trian'; one of convert, convert-store, ")
    assert commands.dispatch("lvm", ["--version"]) == 0
    assert capsys.readouterr().out == f"{lvm.__version__}\n"


@pytest.mark.parametrize("arguments", ["lvm --help", "lvm.inspect --help"])
def test_help_into_a_closed_pipe_ends_quietly(arguments):
    command = ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m {arguments} | true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
