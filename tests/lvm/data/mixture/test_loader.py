"""Batches come through memory that processes share as they were made."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lvm.data.mixture import loader

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)
kinds = st.sampled_from([np.bool_, np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.float32])


def travelled(x):
    compressed = loader.compress({"x": x})["x"]
    return loader.decompress({"x": compressed})["x"], compressed["data"]


@given(st.data())
def test_arrays_come_out_as_they_went_in(data):
    kind = data.draw(kinds)
    x = data.draw(hnp.arrays(kind, shapes))
    found, kept = travelled(x)
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    np.testing.assert_array_equal(found, x)
    assert kept.nbytes <= max(x.nbytes, 1)
    assert not np.shares_memory(found, kept)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 255, 1), (-1, 127, 1), (-1, 128, 2), (0, 8447, 2), (-(2**31), 2**31 - 1, 4), (0, 2**40, 8)],
)
def test_integers_take_the_bytes_that_they_need(low, high, wanted):
    x = np.array([low, high], np.int64)
    found, kept = travelled(x)
    assert kept.itemsize == wanted
    np.testing.assert_array_equal(found, x)


def test_a_row_that_all_rows_are_travels_once_and_bits_take_an_eighth():
    positions = np.broadcast_to(np.arange(4096, dtype=np.int32), (64, 4096))
    found, kept = travelled(positions)
    np.testing.assert_array_equal(found, positions)
    assert kept.nbytes == 2 * 4096
    assert found.flags.c_contiguous
    found[0, 0] = 5  # memory of its own
    assert found[1, 0] == 0
    assert travelled(np.ones((64, 4096), bool))[1].nbytes == 64 * 4096 / 8


def test_objects_pass_as_they_are():
    x = np.array([{"a": 1}, None], object)
    assert travelled(x)[0].tolist() == x.tolist()
