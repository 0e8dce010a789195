"""Claims of items of work on a local folder and on object storage."""

import json
import shutil
import time

import pytest

from lvm.common import claims, files
from lvm.common.claims import Claims, late_claims
from tests.gcs import fake_gcs

TTL_S = 0.6


@pytest.fixture(params=["local", "gs"])
def folder(request, tmp_path):
    if request.param == "local":
        yield f"{tmp_path}/claims"
    else:
        with fake_gcs() as bucket:
            yield f"{bucket}/claims"


def test_claim_is_one_processs_until_it_is_released(folder):
    with Claims(folder) as ours, Claims(folder) as theirs:
        assert ours.acquire("a")
        assert not theirs.acquire("a")
        assert (theirs.busy(), ours.busy()) == ({"a"}, set())
        ours.release("a")
        assert theirs.busy() == set()
        assert theirs.acquire("a")
    assert files.times(folder) == {}


def test_claim_that_is_renewed_stays_busy(folder):
    with Claims(folder, TTL_S) as ours, Claims(folder, TTL_S) as theirs:
        assert ours.acquire("a")
        end = time.monotonic() + 2 * TTL_S
        while time.monotonic() < end:
            assert theirs.busy() == {"a"}
            time.sleep(0.1)


def claim_of(folder, name, **owner):
    """Leaves a claim behind, as a process that was killed."""
    with Claims(folder) as former:
        content = {**json.loads(former._content), **owner}
    files.write_atomically(f"{folder}/{name}", json.dumps(content).encode())


def test_stale_claim_is_taken_over_by_one(folder, tmp_path):
    (tmp_path / "claims").mkdir()
    claim_of(folder, "a.0", machine="another", host="lost-host", process=7)
    with Claims(folder, TTL_S) as ours, Claims(folder, TTL_S) as theirs:
        assert ours.busy() == theirs.busy() == {"a"}
        assert not ours.acquire("a")
        time.sleep(TTL_S + 0.1)
        assert ours.busy() == theirs.busy() == set()
        assert [ours.acquire("a"), theirs.acquire("a")] == [True, False]
        assert theirs.busy() == {"a"}
        ours.release("a")
    assert files.times(folder) == {}


def test_claim_of_an_ended_process_is_stale_at_once(tmp_path):
    claim_of(tmp_path, "a.0", process=2**22 + 1)  # above the highest process ID of Linux
    claim_of(tmp_path, "b.0", process=2**22 + 1, machine="another")
    with Claims(tmp_path) as ours:
        assert ours.busy() == {"b"}
        assert ours.acquire("a")


def test_claim_in_a_folder_that_is_removed_is_none(tmp_path, monkeypatch):
    create = files.create

    def create_in_removed(path, data):  # by the process that has finished
        shutil.rmtree(tmp_path / "claims")
        return create(path, data)

    monkeypatch.setattr(files, "create", create_in_removed)
    with Claims(tmp_path / "claims") as ours:
        assert not ours.acquire("a")
        monkeypatch.undo()
        assert ours.acquire("a")


def test_late_claims_name_their_owners(folder, tmp_path, monkeypatch):
    (tmp_path / "claims").mkdir()
    claim_of(folder, "a.0", host="lost-host", process=7)
    assert late_claims(folder) == (1, {})
    later = time.time() + 300
    monkeypatch.setattr(claims.time, "time", lambda: later)
    count, late = late_claims(folder)
    assert count == 1
    assert late["a"][0] == pytest.approx(300, abs=30)
    assert late["a"][1] == "lost-host, process 7"
