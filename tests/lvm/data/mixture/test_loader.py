"""Compression of batches for shared memory is lossless; the rows of a process; reader processes."""

import os
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lvm.data.mixture import loader
from tests.commands import ROOT

SCRIPT = """
import numpy as np
from lvm.common.errors import UserError
from lvm.data.mixture import loader

def read(step):
    return {"x": np.random.default_rng(step).integers(0, 255, 2**21, np.uint8)}

if __name__ == "__main__":
    try:
        print(len(list(loader.prefetch_batches(read, 0, 9, workers=1))))
    except UserError as error:
        print(error)
"""
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)
dtypes = st.sampled_from([np.bool_, np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.float32])


def round_trip(x):
    """(decompressed array, compressed data)"""
    compressed = loader.compress({"x": x})
    return loader.decompress(compressed)["x"], compressed["x"]["data"]


@given(st.data())
def test_compress_round_trips(data):
    x = data.draw(hnp.arrays(data.draw(dtypes), shapes))
    result, compressed = round_trip(x)
    assert (result.dtype, result.shape) == (x.dtype, x.shape)
    np.testing.assert_array_equal(result, x)
    assert compressed.nbytes <= max(x.nbytes, 1)
    assert not np.shares_memory(result, compressed)


@pytest.mark.parametrize(
    ("low", "high", "size"),
    [(0, 255, 1), (-1, 127, 1), (-1, 128, 2), (0, 8447, 2), (-(2**31), 2**31 - 1, 4), (0, 2**40, 8)],
)
def test_compress_stores_integers_in_their_fewest_bytes(low, high, size):
    x = np.array([low, high], np.int64)
    result, compressed = round_trip(x)
    assert compressed.itemsize == size
    np.testing.assert_array_equal(result, x)


def test_compress_stores_broadcast_rows_once_and_bools_as_bits():
    positions = np.broadcast_to(np.arange(4096, dtype=np.int32), (64, 4096))
    result, compressed = round_trip(positions)
    np.testing.assert_array_equal(result, positions)
    assert compressed.nbytes == 2 * 4096
    assert result.flags.c_contiguous
    result[0, 0] = 5  # rows no longer share memory
    assert result[1, 0] == 0
    assert round_trip(np.ones((64, 4096), bool))[1].nbytes == 64 * 4096 / 8


def test_compress_passes_objects_through():
    x = np.array([{"a": 1}, None], object)
    assert round_trip(x)[0].tolist() == x.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "output"), [("64k", "/dev/shm: too small"), ("1m", "/dev/shm: too small"), ("64m", "9")]
)
def test_small_shared_memory_is_named(tmp_path, size, output):
    (tmp_path / "read.py").write_text(SCRIPT)
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    command = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    if subprocess.run([*mount, command, "sh", "true"], capture_output=True).returncode:
        pytest.skip("this machine makes no user namespaces")
    script = [sys.executable, str(tmp_path / "read.py")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*mount, command, "sh", *script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.startswith(output), result.stderr


def test_reads_ahead_are_bounded():
    """Every batch read ahead takes memory."""
    reads = []
    batches = loader.prefetch_batches(lambda step: reads.append(step) or {"x": np.zeros(1)}, 0, 100)
    next(iter(batches))
    for _ in range(100):
        if len(reads) >= 5:
            break
        time.sleep(0.05)
    time.sleep(0.2)
    assert 5 <= len(reads) <= 8


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([(slice(4, 6),), (slice(0, 2),), (slice(4, 6),)], [0, 1, 4, 5]),  # one of several processes
        ([(slice(None), slice(0, 2))], range(8)),
        ([None], range(8)),
    ],
)
def test_local_rows_are_those_of_this_processs_devices(indices, expected):
    sharding = mock.Mock(spec=jax.sharding.Sharding)
    sharding.addressable_devices_indices_map.return_value = dict(enumerate(indices))
    assert loader.local_rows(sharding, (8, 3)).tolist() == list(expected)
