"""Leases on gs://: one run at a time, expiry after a kill, and loss."""

import queue
import time

import pytest
import requests
from etils import epath

from lvm.common.errors import UserError
from lvm.training import lease
from lvm.training.lease import Lease


def acquire(gcs, ttl_s=0.6, renew_s=0.1):
    return Lease(f"{gcs}/run/.lease", ttl_s, renew_s, poll_s=0.05)


def test_free_lease_is_acquired_and_released(gcs, caplog):
    first = acquire(gcs)
    assert epath.Path(f"{gcs}/run/.lease").exists()
    first.release()
    assert not epath.Path(f"{gcs}/run/.lease").exists()
    acquire(gcs).release()
    assert "waiting" not in caplog.text


def test_renewed_lease_is_refused(gcs):
    first = acquire(gcs)
    with pytest.raises(UserError, match=r"gs://bucket/run: another run is using this workdir"):
        acquire(gcs)
    first.release()


def test_lease_of_killed_run_is_acquired_after_ttl(gcs, caplog):
    killed = acquire(gcs, renew_s=99.0)
    started_at = time.monotonic()
    second = acquire(gcs, ttl_s=0.4)
    assert time.monotonic() - started_at >= 0.4
    assert "held by another run, or one that was killed; waiting 0 s" in caplog.text
    killed.release()  # its generation is gone, so nothing is deleted
    assert epath.Path(f"{gcs}/run/.lease").exists()
    second.release()


def test_renewal_with_lost_response_keeps_lease(gcs, monkeypatch):
    lost = []
    write = Lease._write

    def write_and_lose(self, replaced, retry):
        generation = write(self, replaced, retry)
        if replaced and not lost:
            lost.append(generation)
            raise requests.ConnectionError("reset by peer")
        return generation

    monkeypatch.setattr(Lease, "_write", write_and_lose)
    monkeypatch.setattr(lease, "_WRITE_TIMEOUT_S", 0.1)
    first = acquire(gcs, ttl_s=30.0)
    deadline = time.monotonic() + 10
    while not lost or first._generation <= lost[0]:  # until it has been renewed again
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.release()
    assert not epath.Path(f"{gcs}/run/.lease").exists()


def test_unrenewable_lease_exits_before_ttl(gcs, monkeypatch, capsys):
    codes, started_at = capture_exits(monkeypatch), time.monotonic()
    monkeypatch.setattr(lease, "_WRITE_TIMEOUT_S", 4.0)
    first = acquire(gcs, ttl_s=6.0)

    def failing(self, replaced, retry):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(Lease, "_write", failing)
    assert codes.get(timeout=10) == 1
    assert time.monotonic() - started_at < 6
    assert "the lease is lost: it could not be renewed: no route" in capsys.readouterr().err
    first._released.set()


def capture_exits(monkeypatch):
    """A queue of the codes that `os._exit` is called with."""
    codes = queue.Queue()

    def exit_thread(code):
        codes.put(code)
        raise SystemExit

    monkeypatch.setattr(lease.os, "_exit", exit_thread)
    return codes


def test_taken_lease_exits_at_once(gcs, monkeypatch, capsys):
    codes = capture_exits(monkeypatch)
    first = acquire(gcs)
    epath.Path(f"{gcs}/run/.lease").write_text("another owner")
    assert codes.get(timeout=10) == 1
    assert "the lease is lost: another run has taken it" in capsys.readouterr().err
    first._released.set()
