"""Decoding in processes that may die: neighbors of a failure are loaded, and no process is left behind."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from lvm.common.errors import UserError
from lvm.data.images.decode_pool import Chunk, DecodePool
from lvm.data.images.decode_worker import Limits
from tests.commands import ROOT
from tests.lvm.data.images.misbehaving import DiesOnce, Numbers, Process, Unloadable

SCRIPT = """
import signal

from lvm.data.images.decode_pool import Chunk, DecodePool
from lvm.data.images.decode_worker import Limits
from tests.lvm.data.images.misbehaving import Numbers

signal.signal(signal.SIGINT, signal.default_int_handler)  # which programs in the background ignore
loader = Numbers({2: "hang", 3: "hang in C"})
with DecodePool(2, Limits(decode_timeout_s=1000)) as pool:
    for _ in pool.map(Chunk(loader, [item]) for item in (1, 2, 3)):
        print("loaded", flush=True)
"""


def load(loader, items, workers=1, chunk=5, **limits):
    """Results by item."""
    items, results = list(items), {}
    chunks = [Chunk(loader, items[i : i + chunk], i) for i in range(0, len(items), chunk)]
    with DecodePool(workers, Limits(**limits)) as pool:
        for loaded, (_, values) in zip(chunks, pool.map(chunks), strict=True):
            results.update(zip(loaded.items, values, strict=True))
    assert list(results) == items
    return results


@pytest.fixture(autouse=True)
def no_worker_is_left():
    before = psutil.Process().children()  # other tests' fork servers
    yield
    assert [child for child in psutil.Process().children() if child not in before] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_pool_loads_chunks_in_order(workers):
    results = load(Numbers({}), range(100), workers)
    for item, value in results.items():
        np.testing.assert_array_equal(value, np.arange(item), strict=False)
        assert value.dtype == np.int32
        assert value.flags.writeable


def test_pool_names_what_ends_or_hangs_its_process():
    faults = {3: "exit", 4: "signal", 7: "hang", 9: "hang in C", 12: "no memory"}
    results = load(Numbers(faults), range(15), workers=2, decode_timeout_s=0.75)
    failed = {item: reason for item, reason in results.items() if isinstance(reason, str)}
    assert failed == {
        3: "its decoder ended with exit code 3",
        4: "its decoder ended by signal 11",
        7: "decoding took over 0.75 s",
        9: "decoding took over 0.75 s",
        12: "decoding took more memory than there is",
    }
    assert all(len(value) == item for item, value in results.items() if item not in faults)


def test_pool_names_what_bloats_its_process():
    results = load(Numbers({1: "memory"}), range(3), decode_memory_gb=0.3)
    assert results.pop(1) == "decoding took over 0.3 GB"
    assert all(len(value) == item for item, value in results.items())


def test_memory_limit_below_a_worker_at_rest_is_rejected():
    with pytest.raises(UserError, match=r"decode_memory_gb=0\.001: a worker process takes more"):
        load(Numbers({}), range(3), decode_memory_gb=0.001)


def test_item_that_fails_alone_once_is_loaded(tmp_path):
    results = load(DiesOnce({}, path=str(tmp_path / "attempts")), range(5))
    assert [len(value) for value in results.values()] == list(range(5))
    assert (tmp_path / "attempts").read_text() == "xxx"  # with its chunk, by itself, and in a new process


@pytest.mark.parametrize(("images", "seconds"), [(1, 0.25), (16, 0.25), (17, 0.5), (160, 2.5)])
def test_deadline_is_proportional_to_images(images, seconds):
    assert Limits(decode_timeout_s=0.25).deadline_s(images) == seconds


def test_reason_names_the_deadline_of_a_long_item():
    assert load(Numbers({0: "hang"}, images=17), [0], decode_timeout_s=0.25) == {0: "decoding took over 0.5 s"}


def test_workers_import_no_jax_and_stay():
    results = load(Process({}), range(20))
    assert len({process for process, *_ in results.values()}) == 1
    assert not any(has_jax for _, has_jax, _ in results.values())


@pytest.mark.skipif(sys.platform != "linux", reason="Linux decides by a score")
def test_machine_short_of_memory_ends_a_worker_first():
    ((_, _, score),) = load(Process({}), [0]).values()
    assert score > int(pathlib.Path("/proc/self/oom_score_adj").read_text())


def test_loaders_change_between_chunks():
    loaders = [Numbers({}), Numbers({1: "exit"})]
    with DecodePool(1, Limits()) as pool:
        results = [values for _, values in pool.map(Chunk(loader, [1]) for loader in loaders)]
    assert [len(results[0][0]), results[1]] == [1, ["its decoder ended with exit code 3"]]


@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_a_loader_is_raised(workers):
    with pytest.raises(ValueError, match="a fault of the program"):
        load(Numbers({2: "error"}), range(20), workers)


def test_worker_that_cannot_start_is_no_failure_of_items():
    with pytest.raises(RuntimeError, match="can't start: its decoder ended with exit code 5"):
        load(Unloadable({}), range(3))


@pytest.mark.parametrize("limits", [{"decode_timeout_s": 0}, {"decode_memory_gb": -1}, {"decode_timeout_s": np.nan}])
def test_limits_must_be_positive(limits):
    with pytest.raises(UserError, match=next(iter(limits))):
        Limits(**limits)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_ended_parent(number):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == "loaded\n"
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.send_signal(number)
    assert process.wait(30) in (-number, 1)
    assert not psutil.wait_procs(workers, timeout=30)[1]
    process.stdout.close()
