"""tokenizer.encode in processes of its own: killed, sharing shards, joined, supervised; always equal bytes."""

import os
import pathlib
import random
import re
import signal
import socket
import time

import numpy as np
import psutil
import pytest

from lvm.common import distributed
from lvm.data.store import jsonl
from lvm.data.store.reader import Store
from tests.commands import run, start
from tests.image_files import encode_image, photo
from tests.lvm.data.images.sources.test_tar import write_tar
from tests.object_server import Faults, object_server
from tests.tokenizer.networks import random_weights, small
from tokenizer import weights

SCENES, SHARDS = 160, 8


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Flags of an encoding job, without --out."""
    folder = tmp_path_factory.mktemp("job")
    config = small("maskgit", resolution=32, channel_multipliers=(1, 1, 2), codebook_size=64)
    weights.write(folder / "tokenizer", random_weights(config), "orbax")
    lines = [
        "from ml_collections import ConfigDict",
        "def get_config():",
        f"    return ConfigDict({{'kind': 'generated', 'num_scenes': {SCENES}, 'num_frames': 2}})",
    ]
    (folder / "scenes.py").write_text("\n".join(lines))
    return [
        f"--tokenizer={folder / 'tokenizer'}",
        f"--source={folder / 'scenes.py'}",
        f"--num_shards={SHARDS}",
        "--batch_size=16",
    ]


@pytest.fixture(scope="module")
def reference(job, tmp_path_factory):
    """The store of an uninterrupted run, and its duration in seconds."""
    out, before = tmp_path_factory.mktemp("reference") / "store", time.monotonic()
    run("tokenizer.encode", *job, f"--out={out}", "--workers=1")
    return out, time.monotonic() - before


def contents(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def kill_at_random_moments(job, reference, out, count, seed):
    expected, seconds = reference
    rng = random.Random(seed)
    killed = 0
    while killed < count:
        process = start("tokenizer.encode", *job, f"--out={out}", f"--workers={rng.randrange(3)}")
        time.sleep(rng.uniform(0.3, 1.0) * seconds)  # before 0.3, Python only imports
        workers = psutil.Process(process.pid).children()
        if process.poll() is None:
            process.kill()
            killed += 1
        output, _ = process.communicate()
        assert not psutil.wait_procs(workers, timeout=30)[1]
        if process.returncode == 0:  # finished before the kill: start over in another folder
            assert contents(out) == contents(expected)
            out = out.with_name(f"{out.name}-{killed}")
        else:
            assert process.returncode == -9, output
    return finished(job, out)


def finished(job, out):
    """The contents of a store whose encoding was killed, and then ended."""
    run("tokenizer.encode", *job, f"--out={out}", "--workers=0")
    time.sleep(5)  # age at which temporary files of killed processes are removed
    run("tokenizer.encode", "--finish", f"--out={out}")
    store = Store(out)
    assert sorted(store.scene(i).key for i in range(len(store))) == [f"generated-0-{i:06d}" for i in range(SCENES)]
    return contents(out)


def test_encode_that_was_killed_writes_equal_bytes(job, reference, tmp_path):
    store = tmp_path / "store"
    process = start("tokenizer.encode", *job, f"--out={store}", "--workers=1")
    while not list(store.glob("shard-*.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert len(list(store.glob("shard-*.json"))) < SHARDS
    assert finished(job, store) == contents(reference[0])


@pytest.mark.slow
def test_encode_killed_twenty_times_writes_equal_bytes(job, reference, tmp_path):
    assert kill_at_random_moments(job, reference, tmp_path / "store", 20, seed=1) == contents(reference[0])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_independent_processes_write_equal_bytes(job, reference, tmp_path, processes):
    flags = [*job, f"--out={tmp_path / 'store'}", "--workers=0"]
    started = [start("tokenizer.encode", *flags, f"--shard={i}/{processes}") for i in range(processes)]
    for process in started:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert contents(tmp_path / "store") == contents(reference[0])


@pytest.mark.slow
def test_joined_processes_share_shards_and_exit_together(job, reference, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        monkeypatch.setenv(distributed.COORDINATOR, f"localhost:{free.getsockname()[1]}")
    monkeypatch.setenv(distributed.NUM_PROCESSES, "2")
    started = []
    for process in range(2):
        monkeypatch.setenv(distributed.PROCESS_ID, str(process))
        started.append(start("tokenizer.encode", *job, f"--out={tmp_path / 'store'}", "--workers=0"))
    outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert contents(tmp_path / "store") == contents(reference[0])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_submitted_encode_survives_a_kill(job, reference, tmp_path, processes):
    store, folder = tmp_path / "store", f"{tmp_path / 'folder'}"
    flags = ["--on=local", "--run=encode", f"--processes={processes}"]
    submitted = start("lvm.submit", "encode", *flags, *job, f"--out={store}", f"--folder={folder}", "--max_restarts=1")
    log = tmp_path / "folder" / "log.txt"
    while not list(store.glob("shard-*.json")):
        assert submitted.poll() is None, submitted.communicate()[0]
        time.sleep(0.05)
    rank = psutil.Process(submitted.pid).children()[-1]
    rank.kill()
    verb = ["--on=local", "--run=encode", f"--out={folder}", "--poll=0.1"]
    status = run("lvm.submit", "status", *verb)
    assert f"encode: running, process {submitted.pid}; store {store}" in status
    assert f" of {SHARDS} shards" in status
    assert run("lvm.submit", "watch", *verb) == "encode: ended\n"
    output = submitted.communicate()[0]
    assert submitted.returncode == 0, output
    assert re.search(r"restart 1 of 1 from shard [1-8] after exit code 137", output)
    assert f"{SCENES} scenes" in run("lvm.submit", "logs", *verb)
    assert f"{SCENES} scenes" in log.read_text()
    assert contents(store) == contents(reference[0])


@pytest.mark.slow
def test_submitted_encode_ends_when_it_is_canceled(job, tmp_path):
    store, folder = tmp_path / "store", f"{tmp_path / 'folder'}"
    flags = ["--on=local", "--run=encode", "--processes=2", f"--folder={folder}", *job]
    submitted = start("lvm.submit", "encode", *flags, f"--out={store}")
    while not list(store.glob("shard-*.json")):
        assert submitted.poll() is None, submitted.communicate()[0]
        time.sleep(0.05)
    submitted.terminate()  # as `cancel` does
    output = submitted.communicate()[0]
    assert submitted.returncode == 128 + signal.SIGTERM, output
    assert "restart" not in output
    assert not (store / "manifest.json").exists()


def test_encode_reports_missing_flags_and_finishes(reference, tmp_path):
    assert "--source: required" in run("tokenizer.encode", f"--out={tmp_path}", code=2)
    unlimited = ["tokenizer.encode", f"--out={tmp_path}", "--source=.", "--workers=0", "--decode_memory_gb=2"]
    assert "--decode_memory_gb: limits worker processes; --workers=0 has none" in run(*unlimited, code=2)
    (tmp_path / "a.jsonl").write_text("".join(jsonl.encode_line(np.full((n, 4), n)) for n in (1, 3)))
    (tmp_path / "codes.py").write_text(
        f"def get_config():\n    return dict(kind='jsonl', path='{tmp_path}/a.jsonl', num_codes=8, grid=(2, 2))\n"
    )
    ready = ["tokenizer.encode", f"--source={tmp_path / 'codes.py'}", f"--out={tmp_path / 'ready'}"]
    assert "--augment=2" in run(*ready, "--augment=2", code=2)
    assert "2 scenes, 4 images, 2 of 8 codes used" in run(*ready)
    store = Store(tmp_path / "ready")
    assert [store.scene(i).codes[:, 0].tolist() for i in range(2)] == [[[n] * 4] * n for n in (1, 3)]
    assert "all checksums and counts are right" in run("lvm.inspect", tmp_path / "ready")
    before = {name: os.stat(reference[0] / name).st_mtime_ns for name in contents(reference[0]) if "shard" in name}
    (reference[0] / "manifest.json").unlink()
    assert f"{SCENES} scenes" in run("tokenizer.encode", "--finish", f"--out={reference[0]}")
    assert before == {name: os.stat(reference[0] / name).st_mtime_ns for name in before}


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """A folder to be served, with tars in BUCKET/tars: fewer than shards, so that each has several pieces."""
    folder = tmp_path_factory.mktemp("served")
    for i in range(3):
        photos = [(f"{j}.jpg", encode_image(photo(seed=10 * i + j), "JPEG")) for j in range(8)]
        write_tar(folder / "bucket" / "tars" / f"{i}.tar", photos)
    return folder


def test_encode_from_object_storage_equals_local_disk(job, tars, tmp_path):
    def encode(source, out):
        settings = [flag for flag in job if not flag.startswith("--source")]
        run("tokenizer.encode", *settings, f"--source={source}", f"--out={out}", "--workers=0")
        return Store(str(out))

    local = encode(tars / "bucket" / "tars", tmp_path / "store")
    assert len(local) == 24
    with object_server(tars, Faults(error_share=0.05, drop_share=0.02)):
        for source, out in (
            ("gs://bucket/tars", "gs://bucket/store"),
            ("s3://bucket/tars/*.tar", tmp_path / "s3"),
        ):
            store = encode(source, out)
            for i in range(len(local)):
                assert store.scene(i).key == local.scene(i).key
                np.testing.assert_array_equal(store.scene(i).codes, local.scene(i).codes)
