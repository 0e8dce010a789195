"""Local backend: the lock of a run, its management, signals."""

import errno
import os
import signal
import types

import pytest

from lvm.common.errors import UserError
from lvm.launch import backends, local
from lvm.launch.local import Supervisor
from lvm.launch.requests import Request, SubmittedRun


@pytest.mark.parametrize("has_locks", [True, False])
def test_local_run_is_locked_and_managed_while_it_lives(tmp_path, monkeypatch, capsys, no_file_locks, has_locks):
    if not has_locks:
        no_file_locks(errno.ENOLCK)
    request = Request("a", "/tmp/a", train_arguments=("--config=a.py",))
    submitted = SubmittedRun("a", "/tmp/a", folder=tmp_path)
    signals = []

    def manage_it(supervisor):
        with pytest.raises(UserError, match=rf"process {os.getpid()}"):
            backends.run_local(request, tmp_path, 1, 1.0, lambda: 0, dry_run=False)
        backends.manage("status", backends.LOCAL, submitted, 0.01)
        backends.manage("cancel", backends.LOCAL, submitted, 0.01)
        return 75

    monkeypatch.setattr(local.Supervisor, "run", manage_it)
    monkeypatch.setattr(local.os, "kill", lambda *arguments: signals.append(arguments))
    assert backends.run_local(request, tmp_path, 1, 1.0, lambda: 0, dry_run=False) == 75
    assert f"a: running, process {os.getpid()}; workdir /tmp/a" in capsys.readouterr().out
    assert signals == [(os.getpid(), signal.SIGTERM)]
    assert backends.manage("watch", backends.LOCAL, submitted, 0.01) == 0
    assert "a: ended" in capsys.readouterr().out
    with pytest.raises(UserError, match="a: has ended"):
        backends.manage("cancel", backends.LOCAL, submitted, 0.01)


def test_supervisor_signal_during_start_reaches_all_ranks():
    class Interrupted(Supervisor):
        def _start(self, rank, port):
            process = super()._start(rank, port)
            if rank == 0:
                self._forward_signal(signal.SIGTERM, None)
            return process

    supervisor = Interrupted(["-c", "import time; time.sleep(60)"], 2, max_restarts=0, grace=1.0)
    assert supervisor._run_once() == 128 + signal.SIGTERM


def test_supervisor_file_cut_off_does_not_stop_a_run(tmp_path):
    (tmp_path / "supervisor").write_bytes(b"12\0\0")
    with local.lock_run(tmp_path):
        assert local._state(tmp_path) == f"running, process {os.getpid()}"
    assert local._state(tmp_path) == "ended"


# Rank 0 fails once rank 1 is ready, which notices SIGTERM and hangs.
FAILING = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
if os.environ["LVM_PROCESS_ID"] == "0":
    while not (folder / "ready").exists():
        time.sleep(0.01)
    sys.exit(3)
signal.signal(signal.SIGTERM, lambda *_: (folder / "noticed").touch())
(folder / "ready").touch()
for _ in range(300):
    time.sleep(0.1)
"""


def test_supervisor_kills_hanging_ranks_after_grace(tmp_path):
    supervisor = Supervisor(["-c", FAILING, str(tmp_path)], 2, max_restarts=0, grace=1.0)
    assert supervisor._run_once() == 3
    assert (tmp_path / "noticed").exists()
    assert [rank.returncode for rank in supervisor._ranks] == [3, -signal.SIGKILL]


@pytest.mark.parametrize(
    ("max_restarts", "codes", "never"),
    [
        (1, [75, 75, 75, 75, 0], []),  # preemptions don't count
        (1, [1, 75, 0], []),
        (1, [1, 75, 137], [0]),
        (3, [76, 1, 137, 0], []),
        (0, [75], [0]),
        (0, [1], [0]),
        (3, [2], [0]),
        (3, [75, 65], [0]),
    ],
)
def test_supervisor_restarts_within_budget(monkeypatch, max_restarts, codes, never):
    attempts = iter([*codes, *never])
    monkeypatch.setattr(local.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(Supervisor, "_run_once", lambda self: next(attempts))
    assert Supervisor([], 1, max_restarts, grace=1.0).run() == codes[-1]
    assert list(attempts) == never


@pytest.mark.parametrize(
    ("steps", "code"),
    [
        ([0, 50, 50, 100, 150, 150], 0),  # at most two failures at a step
        ([0, 50, 50, 50, 100, 150], 1),
        ([0, 50, OSError("no answer"), 50, 100, 150], 1),  # unknown: as if there were no new checkpoint
    ],
)
def test_supervisor_budget_refills_at_a_checkpoint(monkeypatch, steps, code):
    codes, newest = iter([*[1] * len(steps), 0]), iter(steps)

    def progress():
        step = next(newest)
        if isinstance(step, OSError):
            raise step
        return step

    monkeypatch.setattr(local.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(Supervisor, "_run_once", lambda self: next(codes))
    assert Supervisor([], 1, 2, 1.0, progress).run() == code


def test_supervisor_does_not_restart_after_sigterm(monkeypatch):
    monkeypatch.setattr(local.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(Supervisor, "_run_once", lambda self: self._forward_signal(signal.SIGTERM, None) or 75)
    assert Supervisor([], 1, max_restarts=3, grace=1.0).run() == 75


def test_supervisor_of_ended_ranks_returns_highest_code():
    supervisor = Supervisor([], 3, max_restarts=0, grace=1.0)
    supervisor._ranks = [types.SimpleNamespace(poll=lambda code=code: code, returncode=code) for code in (0, 75, 0)]
    assert supervisor._wait() == 75
