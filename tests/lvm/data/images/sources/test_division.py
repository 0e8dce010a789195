"""Division of a source among shards: parts are a function of the numbers of files and shards."""

import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st

from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_any_source
from lvm.data.images.sources.division import divide_files, split_range
from lvm.data.images.sources.parquet import ParquetSource
from tests.image_files import encode_image, photo
from tests.lvm.data.images.sources.test_tar import write_tar

small = Preprocess(16)
RGB = encode_image(photo(), "JPEG")


@given(st.integers(1, 60), st.integers(1, 60))
def test_divide_files_covers_files_in_order(num_files, num_shards) -> None:
    shards = [divide_files(num_files, shard, num_shards) for shard in range(num_shards)]
    parts = list(itertools.chain.from_iterable(shards))
    pieces = [(part.start, part.piece, part.pieces) for part in parts]
    of_file = {file: [piece for start, *piece in pieces if start == file] for file in range(num_files)}
    assert pieces == sorted(pieces)
    assert all(part.stop == part.start + 1 for part in parts)
    assert all(each == [[i, len(each)] for i in range(len(each))] for each in of_file.values())
    counts = [len(shard) for shard in shards]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    assert max(map(len, of_file.values())) - min(map(len, of_file.values())) <= 1


@given(st.integers(0, 1000), st.integers(1, 100))
def test_split_range_is_a_partition(size, pieces) -> None:
    ranges = [split_range(size, piece, pieces) for piece in range(pieces)]
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(size))
    assert max(stop - start for start, stop in ranges) - min(stop - start for start, stop in ranges) <= 1


def write_kind(folder, kind: str) -> str:
    """Writes three files of 2, 3 and 4 scenes, or one folder of 9 photos."""
    folder.mkdir()
    for file, count in enumerate((2, 3, 4)):
        if kind == "folder":
            for i in range(count):
                (folder / f"{file}-{i}.jpg").write_bytes(RGB)
        elif kind == "tar":
            write_tar(folder / f"{file}.tar", [(f"{i}.jpg", RGB) for i in range(count)])
        elif kind == "parquet":
            table = pa.table({"image": [RGB] * count})
            pq.write_table(table, folder / f"{file}.parquet", row_group_size=1)
        else:
            writer = ArrayRecordWriter(str(folder / f"{file}.array_record"), "group_size:1")
            for _ in range(count):
                writer.write(RGB)
            writer.close()
    return str(folder)


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "array_record"])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 11])
def test_parts_hold_each_scene_once_in_order(tmp_path, kind, num_shards) -> None:
    path = write_kind(tmp_path / "data", kind)
    source = open_any_source(path, small)
    keys = []
    for shard in range(num_shards):
        for spec in source.plan(shard, num_shards):
            part = source.part(spec)
            keys += [source.info(scene).key for scene in part.scenes]
            assert all(source.load(scene).images.shape == (1, 1, 16, 16, 3) for scene in part.scenes)
            part.release()
    assert not list((tmp_path / "data").glob("*.index.json")), "what is listed once needs no index"
    whole = open_any_source(path, small)
    assert keys == [whole.info(i).key for i in range(9)]


def test_failures_of_a_file_are_listed_by_one_piece(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", RGB), ("2.jpg", RGB), ("x.txt", b""), ("3.depth.png", RGB)])
    source = open_any_source(str(tmp_path / "a.tar"), small)
    parts = [source.part(spec) for shard in range(4) for spec in source.plan(shard, 4)]
    assert [len(part.skipped) for part in parts] == [2, 0, 0, 0]
    assert sum(len(part.scenes) for part in parts) == 2


def test_pieces_of_parquet_are_row_groups(tmp_path, monkeypatch) -> None:
    pq.write_table(pa.table({"image": [RGB] * 12}), tmp_path / "a.parquet", row_group_size=2)
    source, groups = open_any_source(str(tmp_path / "a.parquet"), small), []
    list_groups = ParquetSource._list_groups

    def note(self, file, table, of):
        groups.append(of)
        return list_groups(self, file, table, of)

    monkeypatch.setattr(ParquetSource, "_list_groups", note)
    parts = [source.part(*source.plan(shard, 3)) for shard in range(3)]
    assert groups == [range(2), range(2, 4), range(4, 6)]
    assert [source.info(part.scenes[0]).key for part in parts] == ["a.parquet/0", "a.parquet/4", "a.parquet/8"]
