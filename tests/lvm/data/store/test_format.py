"""Records hold their scenes exactly, or are refused."""

import struct

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lvm.common.errors import UserError
from lvm.data.store.format import MAGIC, PAGE_SIZE, VERSION, Scene, pack, unpack

STREAMS = (1, 2, 3)  # in each stream set
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
classes = st.integers(-1, 2**31 - 1)


@st.composite
def records(draw):
    """A scene of any shape, or a page of scenes of one image."""
    stream_set = draw(st.integers(0, 2))
    frames = draw(st.integers(1, 4))
    count = draw(st.integers(1, PAGE_SIZE)) if frames * STREAMS[stream_set] == 1 else 1
    shape = (frames, STREAMS[stream_set], draw(st.integers(1, 8)))
    codes = draw(hnp.arrays(np.uint16, (count, *shape)))
    return [Scene(draw(keys), draw(classes), stream_set, codes[i]) for i in range(count)]


def page(count=3, key="scene"):
    return [Scene(f"{key} {i}", i, 0, np.full((1, 1, 4), i, np.uint16)) for i in range(count)]


@given(records())
def test_a_record_holds_its_scenes(scenes):
    found = unpack(pack(scenes), STREAMS, "here")
    assert len(found) == len(scenes)
    for scene, read in zip(scenes, found, strict=True):
        assert (read.key, read.class_id, read.stream_set) == (scene.key, scene.class_id, scene.stream_set)
        np.testing.assert_array_equal(read.codes, scene.codes)


@given(records(), st.data())
def test_a_changed_byte_is_refused(scenes, data):
    record = bytearray(pack(scenes))
    record[data.draw(st.integers(0, len(record) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(UserError, match=r"^shard 3, record 5: "):
        unpack(bytes(record), STREAMS, "shard 3, record 5")


@given(st.integers(0, 2**16 - 1))
def test_another_number_of_scenes_is_refused(count):
    record = bytearray(pack(page(PAGE_SIZE)))
    record[6:8] = struct.pack("<H", count)
    if count == PAGE_SIZE:
        assert len(unpack(bytes(record), STREAMS, "here")) == PAGE_SIZE
    else:
        with pytest.raises(UserError, match=rf"here: damaged: .*{count} scenes"):
            unpack(bytes(record), STREAMS, "here")


@given(records(), st.data())
def test_a_cut_off_record_is_refused(scenes, data):
    record = pack(scenes)
    with pytest.raises(UserError, match=r"^here: "):
        unpack(record[: data.draw(st.integers(0, len(record) - 1))], STREAMS, "here")


def test_another_version_or_format_is_named():
    record = pack(page())
    newer = MAGIC + struct.pack("<H", VERSION + 1) + record[6:]
    with pytest.raises(UserError, match=rf"here: found {MAGIC!r} version 3, wanted {MAGIC!r} version 2"):
        unpack(newer, STREAMS, "here")
    with pytest.raises(UserError, match=r"here: found b'PNG!'"):
        unpack(b"PNG!" + record[4:], STREAMS, "here")
    with pytest.raises(UserError, match="here: 3 bytes are too few"):
        unpack(b"LVM", STREAMS, "here")


def test_the_layout_is_the_one_described():
    codes = np.arange(6 * 2, dtype=np.uint16).reshape(3, 2, 2) + 256
    record = pack([Scene("é", 7, 1, codes)])
    assert record[:8] == b"LVMS" + bytes([2, 0]) + bytes([1, 0])
    head = struct.pack("<IIIiH", 3, 1, 2, 7, 2) + "é".encode()
    assert record[8:12] == struct.pack("<I", google_crc32c.value(record[:8] + head))
    assert record[12 : 12 + len(head)] == head
    blocks = [codes.astype("<u2").tobytes()[:16], codes.astype("<u2").tobytes()[16:]]  # 4 grids and 2
    checked = [block + struct.pack("<I", google_crc32c.value(block)) for block in blocks]
    assert record[12 + len(head) :] == b"".join(checked)


def test_pages_hold_only_single_images_of_one_kind():
    with pytest.raises(ValueError, match=f"up to {PAGE_SIZE} scenes of one image, not {PAGE_SIZE + 1}"):
        pack(page(PAGE_SIZE + 1))
    video = Scene("video", -1, 0, np.zeros((2, 1, 4), np.uint16))
    with pytest.raises(ValueError, match="not 2 of 2×1"):
        pack([video, video])
    with pytest.raises(ValueError, match="must agree in shape"):
        pack([*page(1), Scene("larger", -1, 0, np.zeros((1, 1, 5), np.uint16))])
