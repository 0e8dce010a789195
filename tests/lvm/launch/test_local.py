"""A run on this machine is found, refused twice, and told to end, at whatever moment."""

import os
import signal

import pytest

from lvm.common.errors import UserError
from lvm.launch import backends, local
from lvm.launch.local import Supervisor
from lvm.launch.request import ClusterConfig, Request, Submitted


def test_a_run_on_this_machine_is_found_while_it_lives(tmp_path, monkeypatch, capsys):
    request = Request(run="a", workdir="/tmp/a", job=("--config=a.py",))
    run_of_it = Submitted("a", ClusterConfig(), tmp_path, "/tmp/a")
    said = []

    def look_at_it(supervisor):
        with pytest.raises(UserError, match=rf"a run of this name is going on \(process {os.getpid()}\)"):
            backends.run_here(request, tmp_path, 1, 1.0, dry_run=False)
        backends.manage("status", backends.LOCAL, run_of_it, 0.01)
        backends.manage("cancel", backends.LOCAL, run_of_it, 0.01)
        return 75

    monkeypatch.setattr(local.Supervisor, "run", look_at_it)
    monkeypatch.setattr(backends.os, "kill", lambda *given: said.append(given))
    assert backends.run_here(request, tmp_path, 1, 1.0, dry_run=False) == 75
    assert f"a: running, process {os.getpid()}; it lives in /tmp/a" in capsys.readouterr().out
    assert said == [(os.getpid(), signal.SIGTERM)]
    assert backends.manage("watch", backends.LOCAL, run_of_it, 0.01) == 0
    assert "a: has ended" in capsys.readouterr().out
    with pytest.raises(UserError, match="a: has ended already"):
        backends.manage("cancel", backends.LOCAL, run_of_it, 0.01)


def test_a_signal_while_ranks_are_being_started_reaches_them_all():
    class Interrupted(Supervisor):
        def _start(self, rank, port):
            started = super()._start(rank, port)
            if rank == 0:
                self._pass_on(signal.SIGTERM, None)
            return started

    supervisor = Interrupted(["-c", "import time; time.sleep(60)"], 2, max_restarts=0, grace=1.0)
    assert supervisor._run_once() == 128 + signal.SIGTERM
