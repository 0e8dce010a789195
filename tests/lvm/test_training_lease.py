"""A workdir on gs:// has one run at a time, and a killed one gives way."""

import threading
import time

import pytest
from etils import epath

from lvm.errors import UserError
from lvm.training import lease
from lvm.training.lease import Lease


def take(gcs, stale=0.6, renewed=0.1):
    return Lease(f"{gcs}/run/.lease", stale, renewed, look=0.05)


def test_a_free_lease_is_taken_and_given_back(gcs, capsys):
    first = take(gcs)
    assert epath.Path(f"{gcs}/run/.lease").exists()
    first.release()
    assert not epath.Path(f"{gcs}/run/.lease").exists()
    take(gcs).release()
    assert "waiting" not in capsys.readouterr().out


def test_a_lease_that_is_renewed_is_refused(gcs):
    first = take(gcs)
    with pytest.raises(UserError, match=r"gs://bucket/run: another run is using this workdir"):
        take(gcs)
    first.release()


def test_the_lease_of_a_killed_run_is_taken_when_it_has_grown_stale(gcs, capsys):
    killed = take(gcs, renewed=99.0)
    began = time.monotonic()
    second = take(gcs, stale=0.4)
    assert time.monotonic() - began >= 0.4
    assert "another run holds it or was killed; waiting 0 s" in capsys.readouterr().out
    killed.release()  # whose generation is gone: it takes nothing away
    assert epath.Path(f"{gcs}/run/.lease").exists()
    second.release()


def test_a_run_whose_lease_was_taken_ends_at_once(gcs, monkeypatch, capsys):
    ended = threading.Event()
    codes = []

    def end(code):
        codes.append(code)
        ended.set()
        raise SystemExit  # of its thread

    monkeypatch.setattr(lease.os, "_exit", end)
    first = take(gcs)
    epath.Path(f"{gcs}/run/.lease").write_text("somebody else's")
    assert ended.wait(10)
    assert codes == [1]
    assert "the lease is lost: another run has taken it" in capsys.readouterr().err
    first._released.set()
