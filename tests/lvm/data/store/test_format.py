"""Record format: round trip, layout, and detection of corruption."""

import struct

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lvm.data.store.format import MAGIC, PAGE_SIZE, VERSION, DamagedError, Scene, pack, unpack

NUM_STREAMS = (1, 2, 3)  # of each stream set
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
classes = st.integers(-1, 2**31 - 1)


@st.composite
def records(draw):
    """The scenes of a record: one of any shape, or a page of single-image scenes."""
    stream_set = draw(st.integers(0, 2))
    frames = draw(st.integers(1, 4))
    count = draw(st.integers(1, PAGE_SIZE)) if frames * NUM_STREAMS[stream_set] == 1 else 1
    shape = (frames, NUM_STREAMS[stream_set], draw(st.integers(1, 8)))
    codes = draw(hnp.arrays(np.uint16, (count, *shape)))
    return [Scene(draw(keys), draw(classes), stream_set, codes[i]) for i in range(count)]


def page(count=3, key="scene"):
    return [Scene(f"{key} {i}", i, 0, np.full((1, 1, 4), i, np.uint16)) for i in range(count)]


@given(records())
def test_unpack_inverts_pack(scenes):
    unpacked = unpack(pack(scenes), NUM_STREAMS)
    assert len(unpacked) == len(scenes)
    for scene, copy in zip(scenes, unpacked, strict=True):
        assert (copy.key, copy.class_id, copy.stream_set) == (scene.key, scene.class_id, scene.stream_set)
        np.testing.assert_array_equal(copy.codes, scene.codes)


@given(records(), st.data())
def test_unpack_rejects_any_changed_byte(scenes, data):
    record = bytearray(pack(scenes))
    record[data.draw(st.integers(0, len(record) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DamagedError):
        unpack(bytes(record), NUM_STREAMS)


@given(st.integers(0, 2**16 - 1))
def test_unpack_rejects_a_wrong_scene_count(count):
    record = bytearray(pack(page(PAGE_SIZE)))
    record[6:8] = struct.pack("<H", count)
    if count == PAGE_SIZE:
        assert len(unpack(bytes(record), NUM_STREAMS)) == PAGE_SIZE
    else:
        with pytest.raises(DamagedError, match=f" {count} scenes"):
            unpack(bytes(record), NUM_STREAMS)


@given(records(), st.data())
def test_unpack_rejects_a_truncated_record(scenes, data):
    record = pack(scenes)
    with pytest.raises(DamagedError):
        unpack(record[: data.draw(st.integers(0, len(record) - 1))], NUM_STREAMS)


def test_unpack_rejects_another_version_or_format():
    record = pack(page())
    newer = MAGIC + struct.pack("<H", VERSION + 1) + record[6:]
    with pytest.raises(DamagedError, match=rf"{MAGIC!r} version 3, not {MAGIC!r} version 2"):
        unpack(newer, NUM_STREAMS)
    with pytest.raises(DamagedError, match="b'PNG!'"):
        unpack(b"PNG!" + record[4:], NUM_STREAMS)
    with pytest.raises(DamagedError, match="3 bytes"):
        unpack(b"LVM", NUM_STREAMS)


def test_pack_writes_the_documented_layout():
    codes = np.arange(6 * 2, dtype=np.uint16).reshape(3, 2, 2) + 256
    record = pack([Scene("é", 7, 1, codes)])
    assert record[:8] == b"LVMS" + bytes([2, 0]) + bytes([1, 0])
    head = struct.pack("<IIIiH", 3, 1, 2, 7, 2) + "é".encode()
    assert record[8:12] == struct.pack("<I", google_crc32c.value(record[:8] + head))
    assert record[12 : 12 + len(head)] == head
    blocks = [codes.astype("<u2").tobytes()[:16], codes.astype("<u2").tobytes()[16:]]  # 4 grids and 2
    checked = [block + struct.pack("<I", google_crc32c.value(block)) for block in blocks]
    assert record[12 + len(head) :] == b"".join(checked)


def test_pack_rejects_scenes_that_share_no_page():
    with pytest.raises(ValueError, match=f"{PAGE_SIZE} scenes of one image, not {PAGE_SIZE + 1}"):
        pack(page(PAGE_SIZE + 1))
    video = Scene("video", -1, 0, np.zeros((2, 1, 4), np.uint16))
    with pytest.raises(ValueError, match="not 2 of 2×1"):
        pack([video, video])
    with pytest.raises(ValueError, match="shape"):
        pack([*page(1), Scene("larger", -1, 0, np.zeros((1, 1, 5), np.uint16))])
