"""Progress of a store over all of its processes, and listings at the start of many."""

import json
import os
import time

import numpy as np
import pytest

from lvm.common import files
from lvm.data.store import status, writer
from lvm.data.store.format import Scene, shard_name
from lvm.data.store.manifest import MANIFEST
from lvm.data.store.shard_queue import ShardQueue
from tests.gcs import fake_gcs

NUM_SHARDS = 4
HEADER = {"tokenizer": {"grid": [2, 2], "num_codes": 64}, "streams": {"rgb": {"kind": "image"}}}


def write(folder, shard, reasons=()):
    scene = Scene(f"scene {shard}", "", ("rgb",), np.zeros((3, 1, 4), np.uint16), shard)
    skipped = writer.SkippedItems([{"key": f"{i}.png", "reason": reason} for i, reason in enumerate(reasons)])
    writer.write_shard(folder, shard, NUM_SHARDS, [scene], 64, skipped)


@pytest.fixture(params=["local", "gs"])
def folder(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "store")
    else:
        with fake_gcs() as bucket:
            yield f"{bucket}/store"


def test_status_sums_over_all_processes(folder):
    writer.begin_store(folder, HEADER, NUM_SHARDS)
    (line,) = status.describe_progress(folder)
    assert "0 of 4 shards, 0 images; no shard was completed in the last" in line
    write(folder, 0, ["frame 1: truncated", "frame 2: truncated"])
    write(folder, 2, ["frame 7: truncated"])
    with ShardQueue(folder, NUM_SHARDS) as queue:
        taken = next(next(queue.passes()))
        assert taken in (1, 3)
        progress, claims, *reasons = status.describe_progress(folder)
    assert progress.startswith(f"{folder}: 2 of 4 shards, 6 images; ")
    assert "images/s in the last" in progress
    assert claims == "1 shards are claimed, 0 of the claims stale"
    assert "3 failures" in reasons[0]
    assert "3 × frame #: truncated" in reasons[1]
    write(folder, 1)
    write(folder, 3)
    assert MANIFEST in status.describe_progress(folder)[0]
    assert not writer.finish_store(folder)
    assert "4 of 4 shards, 12 images; finished" in status.describe_progress(folder)[0]


def test_status_measures_the_rate_of_the_last_half_hour(tmp_path):
    writer.begin_store(tmp_path, HEADER, NUM_SHARDS)
    now = time.time()
    for shard, age_s in enumerate((7000, 1200, 300)):
        write(tmp_path, shard)
        os.utime(tmp_path / f"{shard_name(shard, NUM_SHARDS)}.json", (now - age_s, now - age_s))
    os.utime(tmp_path / "header.json", (now - 9000, now - 9000))
    (tmp_path / "claims").mkdir()
    claim = tmp_path / "claims" / "shard-00003-of-00004.1"
    claim.write_text(json.dumps({"host": "lost-host", "process": 7, "machine": "", "id": ""}))
    os.utime(claim, (now - 400, now - 400))
    progress, claims, stale, *_ = status.describe_progress(tmp_path)
    assert "0.00333 images/s in the last 30m00s, 15m" in progress
    assert claims == "1 shards are claimed, 1 of the claims stale:"
    assert "shard-00003-of-00004: lost-host, process 7, last renewed 6m4" in stale


def test_claim_made_while_claims_are_removed_ends_nothing(tmp_path, monkeypatch):
    writer.begin_store(tmp_path, HEADER, NUM_SHARDS)
    claims, rmdir = tmp_path / "claims", os.rmdir

    def rmdir_after_claim(path, **options):
        (claims / "manifest.0").write_text("{}")
        return rmdir(path, **options)

    with ShardQueue(tmp_path, NUM_SHARDS) as queue:
        with queue.finishing():
            monkeypatch.setattr(os, "rmdir", rmdir_after_claim)
        monkeypatch.undo()
        assert claims.exists()
        (claims / "manifest.0").unlink()
        with queue.finishing():
            pass
    assert not claims.exists()


def test_many_processes_list_the_store_once_each(tmp_path, monkeypatch):
    writer.begin_store(tmp_path, HEADER, NUM_SHARDS)
    listings = []
    list_all = writer.missing_shards
    monkeypatch.setattr(writer, "missing_shards", lambda *args: listings.append(args) or list_all(*args))
    monkeypatch.setattr(files, "file_size", lambda path: pytest.fail(f"{path}: asked for by itself"))
    queues = [ShardQueue(tmp_path, NUM_SHARDS) for _ in range(NUM_SHARDS)]
    taken = [next(next(queue.passes())) for queue in queues]
    assert sorted(taken) == [*range(NUM_SHARDS)]
    assert len(listings) == NUM_SHARDS
