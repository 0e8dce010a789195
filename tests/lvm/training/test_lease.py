"""A workdir on gs:// has one run at a time, and a killed one gives way."""

import queue
import time

import pytest
import requests
from etils import epath

from lvm.common.errors import UserError
from lvm.training import lease
from lvm.training.lease import Lease


def take(gcs, stale=0.6, renewed=0.1):
    return Lease(f"{gcs}/run/.lease", stale, renewed, look=0.05)


def test_a_free_lease_is_taken_and_given_back(gcs, caplog):
    first = take(gcs)
    assert epath.Path(f"{gcs}/run/.lease").exists()
    first.release()
    assert not epath.Path(f"{gcs}/run/.lease").exists()
    take(gcs).release()
    assert "waiting" not in caplog.text


def test_a_lease_that_is_renewed_is_refused(gcs):
    first = take(gcs)
    with pytest.raises(UserError, match=r"gs://bucket/run: another run is using this workdir"):
        take(gcs)
    first.release()


def test_the_lease_of_a_killed_run_is_taken_when_it_has_grown_stale(gcs, caplog):
    killed = take(gcs, renewed=99.0)
    began = time.monotonic()
    second = take(gcs, stale=0.4)
    assert time.monotonic() - began >= 0.4
    assert "another run holds it or was killed; waiting 0 s" in caplog.text
    killed.release()  # whose generation is gone: it takes nothing away
    assert epath.Path(f"{gcs}/run/.lease").exists()
    second.release()


def test_a_renewal_of_which_the_answer_was_lost_is_no_loss(gcs, monkeypatch):
    lost = []
    write = Lease._write

    def losing(self, replaced, retry):
        generation = write(self, replaced, retry)
        if replaced and not lost:
            lost.append(generation)
            raise requests.ConnectionError("reset by peer")
        return generation

    monkeypatch.setattr(Lease, "_write", losing)
    monkeypatch.setattr(lease, "_PATIENCE", 0.1)
    first = take(gcs, stale=30.0)
    deadline = time.monotonic() + 10
    while not lost or first._generation <= lost[0]:  # it has been renewed since
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.release()
    assert not epath.Path(f"{gcs}/run/.lease").exists()


def test_a_lease_that_can_not_be_renewed_ends_the_run_before_another_may_take_it(gcs, monkeypatch, capsys):
    codes, began = ending(monkeypatch), time.monotonic()
    monkeypatch.setattr(lease, "_PATIENCE", 4.0)
    first = take(gcs, stale=6.0)

    def failing(self, replaced, retry):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(Lease, "_write", failing)
    assert codes.get(timeout=10) == 1
    assert time.monotonic() - began < 6
    assert "the lease is lost: it could not be renewed: no route" in capsys.readouterr().err
    first._released.set()


def ending(monkeypatch):
    """The exit codes of a run that would end."""
    codes = queue.Queue()

    def end(code):
        codes.put(code)
        raise SystemExit  # of its thread

    monkeypatch.setattr(lease.os, "_exit", end)
    return codes


def test_a_run_whose_lease_was_taken_ends_at_once(gcs, monkeypatch, capsys):
    codes = ending(monkeypatch)
    first = take(gcs)
    epath.Path(f"{gcs}/run/.lease").write_text("somebody else's")
    assert codes.get(timeout=10) == 1
    assert "the lease is lost: another run has taken it" in capsys.readouterr().err
    first._released.set()
