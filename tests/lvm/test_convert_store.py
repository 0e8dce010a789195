"""Conversion of stores of version 3: the same scenes in the same order, restartable, and compared."""

import os
import pathlib

import numpy as np
import pytest
from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.convert_store import convert_store
from lvm.data.store import failures, version3, writer
from lvm.data.store.reader import Store
from lvm.data.store.verify import find_problems
from tests.commands import run
from tests.lvm.conftest import STREAM_SETS, header, make_scenes
from tests.lvm.data.store.version3 import pack, write_store

SHAPES = [(1, 0)] * 70 + [(3, 0), (1, 1)] + [(1, 0)] * 5 + [(2, 2), (1, 0)]
OLD_HEADER = header() | {"classes": ["cat", "dog"], "stream_sets": [list(names) for names in STREAM_SETS]}
FAILURES = ({"key": "broken", "reason": "cut off"},)


def write_old(folder):
    """Writes a store of version 3; returns its scenes by shard."""
    shards = [make_scenes(SHAPES), make_scenes([(2, 1), (5, 0)], seed=1), []]
    write_store(folder, OLD_HEADER, shards, FAILURES)
    return shards


def contents(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def convert(old, new):
    convert_store(epath.Path(old), epath.Path(new))
    assert writer.finish_store(new) == []


@pytest.fixture
def converted(tmp_path):
    """The path of a converted store; the old one is beside it."""
    write_old(tmp_path / "old")
    convert(tmp_path / "old", tmp_path / "new")
    return tmp_path / "new"


def test_command_converts_all_scenes_in_the_old_order(tmp_path):
    shards = write_old(tmp_path / "old")
    output = run("lvm.convert_store", tmp_path / "old", tmp_path / "new")
    assert "81 scenes, 94 images, 16 of 16 codes used\n" in output
    assert f"1 failures, listed in {tmp_path / 'new' / '*.failures.jsonl'}:\n" in output
    store = Store(tmp_path / "new")
    assert list(find_problems(store)) == []
    # Version 3 has single images in pages after the longer scenes.
    first = sorted(shards[0], key=lambda scene: scene.codes.shape[:2] == (1, 1))
    singles = first[3:]
    expected = [*singles[:64], *first[:3], *singles[64:], *shards[1]]
    assert len(store) == len(expected)
    for i, scene in enumerate(expected):
        copy = store.scene(i)
        np.testing.assert_array_equal(copy.codes, scene.codes)
        for name in ("key", "class_name", "streams", "group"):
            assert getattr(copy, name) == getattr(scene, name)
    assert store.manifest["group_hashes"][0] == 7  # of the failed scene
    assert list(failures.read(store.path)) == list(FAILURES)
    assert store.manifest["versions"] == {"lvm": ["0.0.9"]}


def test_version_3_is_refused_elsewhere_with_the_command(tmp_path):
    write_old(tmp_path / "old")
    remedy = f"lvm convert-store {tmp_path / 'old'} NEW"
    files.write_json(
        tmp_path / "old" / "manifest.json",
        OLD_HEADER | {"version": 3, "group_hashes": [], "histogram": [], "shards": []},
    )
    with pytest.raises(UserError, match=remedy):
        Store(tmp_path / "old")
    output = run("lvm.inspect", tmp_path / "old", code=1)
    assert remedy in output
    assert len(output.splitlines()) == 1
    assert remedy in run("tokenizer.encode", "--finish", f"--out={tmp_path / 'old'}", code=2)


def test_conversion_goes_on_where_it_stopped(converted, tmp_path):
    new, expected = tmp_path / "again", contents(converted)
    for process in (2, 0):
        convert_store(epath.Path(tmp_path / "old"), epath.Path(new), process, 3)
    assert writer.finish_store(new) == ["shard-00001-of-00003"]
    times = {file.name: file.stat().st_mtime_ns for file in new.glob("shard-*")}
    assert len(times) == 7
    convert(tmp_path / "old", new)
    assert contents(new) == expected
    assert {name: (new / name).stat().st_mtime_ns for name in times} == times


def test_conversion_of_an_unfinished_store_leaves_the_rest(converted, tmp_path, caplog):
    (tmp_path / "old" / "shard-00001-of-00003.json").unlink()
    convert_store(epath.Path(tmp_path / "old"), epath.Path(tmp_path / "part"))
    assert "shard-00001-of-00003 is missing; tokenizer.encode --out=" in caplog.text
    assert writer.finish_store(tmp_path / "part") == ["shard-00001-of-00003"]


@pytest.mark.parametrize("suffix", ["array_record", "index"])
def test_damaged_old_shard_is_named_and_not_converted(tmp_path, suffix):
    write_old(tmp_path / "old")
    file = tmp_path / "old" / f"shard-00001-of-00003.{suffix}"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"^{file}: damaged: "):
        convert_store(epath.Path(tmp_path / "old"), epath.Path(tmp_path / "new"))
    assert [file.name for file in sorted((tmp_path / "new").glob("*.json"))] == [
        "header.json",
        "shard-00000-of-00003.json",
    ]


@pytest.mark.parametrize("at", [0, 8, 30, -3])
def test_damaged_record_is_named_by_its_number(tmp_path, at):
    record = bytearray(write_and_read_record(tmp_path))
    record[at] ^= 1
    with pytest.raises(ValueError, match=r"checksum|format"):
        version3._unpack(bytes(record), OLD_HEADER, [0] * 3)


def test_record_of_an_unknown_stream_set_is_named():
    record = pack(make_scenes([(1, 1)]), OLD_HEADER)
    with pytest.raises(ValueError, match="1 scenes of stream set 1"):
        version3._unpack(record, OLD_HEADER | {"stream_sets": [["rgb"]]}, [0])


def write_and_read_record(folder):
    scenes = make_scenes([(1, 0)] * 3)
    record = pack(scenes, OLD_HEADER)
    _, copies = version3._unpack(record, OLD_HEADER, [scene.group for scene in scenes])
    assert [copy.key for copy in copies] == [scene.key for scene in scenes]
    return record


@pytest.mark.parametrize("field", ["codes", "key", "class_name", "group"])
def test_shard_unlike_what_was_read_is_not_kept(tmp_path, monkeypatch, field):
    write_old(tmp_path / "old")
    reads, read_scenes = [], version3.read_scenes

    def changed(*arguments):
        """The second reading, for the comparison, differs in the last scene."""
        reads.append(list(read_scenes(*arguments)))
        if len(reads) == 2:
            scene = reads[-1][-1]
            value = {"codes": scene.codes ^ 1, "key": "other", "class_name": "cow", "group": 5}[field]
            reads[-1][-1] = type(scene)(**{**vars(scene), field: value})
        return iter(reads[-1])

    monkeypatch.setattr(version3, "read_scenes", changed)
    with pytest.raises(UserError, match="was not written as it was read"):
        convert_store(epath.Path(tmp_path / "old"), epath.Path(tmp_path / "new"))
    assert os.listdir(tmp_path / "new") == ["header.json"]


def test_entry_unlike_the_codes_is_refused(tmp_path):
    write_old(tmp_path / "old")
    path = tmp_path / "old" / "shard-00000-of-00003.json"
    files.write_json(path, files.read_json(path) | {"images": 5})
    with pytest.raises(UserError, match="shard-00000-of-00003: images differ"):
        convert_store(epath.Path(tmp_path / "old"), epath.Path(tmp_path / "new"))


def test_remote_store_is_converted(gcs, converted, tmp_path):
    for file in (tmp_path / "old").iterdir():
        files.put(file, f"{gcs}/old/{file.name}")
    convert(f"{gcs}/old", f"{gcs}/new")
    assert {path.name: path.read_bytes() for path in epath.Path(f"{gcs}/new").iterdir()} == contents(converted)


def test_only_version_3_is_converted(converted, tmp_path):
    with pytest.raises(UserError, match="version 4, expected 3"):
        convert_store(epath.Path(converted), epath.Path(tmp_path / "other"))
    with pytest.raises(UserError, match=r"header\.json is missing"):
        convert_store(epath.Path(tmp_path), epath.Path(tmp_path / "other"))
