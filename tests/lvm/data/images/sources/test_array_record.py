"""ArrayRecord and Parquet of picture files, and JSONL of ready codes, as scenes."""

from __future__ import annotations

import os
import pathlib
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_any_source, open_source
from lvm.data.images.sources.parquet import ParquetSource
from lvm.data.store import jsonl
from tests.image_files import BAD, ODD, check_image_files, encode_image, photo

small = Preprocess(16)
FILES = {name: content for name, (content, _) in (BAD | ODD).items()}
IDS = encode_image(np.full((32, 48), 3, np.uint8))


def write_records(path: pathlib.Path, records: list[bytes]) -> pathlib.Path:
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def check_copies(source) -> None:
    """That a source works in another process, and tells that it is the same."""
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.load(0).images, source.load(0).images)
    assert copy.describe() == source.describe()
    with pytest.raises(IndexError):
        source.load(len(source))
    with pytest.raises(IndexError):
        source.info(-1)


# --- ArrayRecord.


def test_records_are_pictures(tmp_path) -> None:
    write_records(tmp_path / "a.array_record", list(FILES.values()))
    source = open_source(str(tmp_path / "a.array_record"), small)
    check_image_files(source, lambda key: list(FILES)[int(key.removeprefix("a.array_record/"))])
    assert source.stream_sets == (("rgb",),)


def test_several_files_of_records_and_one_that_is_none(tmp_path) -> None:
    for name in ("a-10.array_record", "a-2.array_record"):
        write_records(tmp_path / name, [encode_image(photo(seed=i)) for i in range(3)])
    (tmp_path / "a-3.array_record").write_bytes(b"")
    (tmp_path / "a-4.array_record").write_bytes(b"no records" * 1000)
    (tmp_path / "a-5.array_record").symlink_to(tmp_path / "nowhere")
    source = open_source(str(tmp_path), small)
    assert [source.info(i).key for i in (0, 2, 3)] == [
        "a-2.array_record/0",
        "a-2.array_record/2",
        "a-10.array_record/0",
    ]
    assert [failure.key for failure in source.skipped] == [f"a-{number}.array_record" for number in (3, 4, 5)]
    assert not any(str(tmp_path) in failure.reason for failure in source.skipped)
    check_copies(source)
    for name in ("a-10.array_record", "a-2.array_record"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="no records in its files"):
        open_source(str(tmp_path), small)


# --- Parquet.


def test_rows_are_pictures(tmp_path) -> None:
    table = pa.table({"image": list(FILES.values()), "name": list(FILES)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    source = ParquetSource(small, path=str(tmp_path / "a.parquet"), key="name")
    check_image_files(source)
    check_copies(ParquetSource(small, path=str(tmp_path), streams={"rgb": "image"}))


def test_of_a_file_that_is_damaged_in_its_midst_no_row_is_used(tmp_path) -> None:
    for name, shade in (("a", 10), ("b", 200)):
        images = [encode_image(np.full((8, 8, 3), shade, np.uint8))] * 4
        table = pa.table({"image": images, "id": [f"{name}{number}" * 50 for number in range(4)]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    damaged = tmp_path / "a.parquet"
    column, data = pq.ParquetFile(damaged).metadata.row_group(1).column(1), bytearray(damaged.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 60] = bytes(255 - byte for byte in data[start : start + 60])
    damaged.write_bytes(data)
    source = ParquetSource(small, path=str(tmp_path), streams={"rgb": "image"}, key="id")
    assert [failure.key for failure in source.skipped] == ["a.parquet"]
    assert [source.info(i).key[:2] for i in range(len(source))] == ["b0", "b1", "b2", "b3"]
    assert all((source.load(i).images == 200).all() for i in range(len(source)))


def test_columns_of_structs_streams_keys_groups_and_classes(tmp_path) -> None:
    rgb = {"bytes": encode_image(photo()), "path": "x.png"}
    table = pa.table(
        {
            "image": pa.array(
                [rgb, rgb, None, rgb], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            ),
            "segmentation": pa.array([IDS, None, IDS, IDS], pa.binary()),
            "id": ["a", "b", "c", "a"],
            "video": ["v", "v", "w", "w"],
            "kind": ["cat", "dog", "cat", None],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    names = {"key": "id", "group": "video", "class_name": "kind"}
    source = ParquetSource(small, path=str(tmp_path / "*.parquet"), **names)
    infos = [source.info(i) for i in range(len(source))]
    assert [(i.key, i.group, i.class_name, i.streams) for i in infos] == [
        ("a", "v", "cat", ("rgb", "segmentation")),
        ("b", "v", "dog", ("rgb",)),
    ]
    assert {failure.key: failure.reason for failure in source.skipped} == {
        "a.parquet/2": "column 'image' is null",
        "a.parquet/3": "its key 'a' is that of an earlier row, which is used",
    }
    assert source.classes == ("cat", "dog")
    assert (source.streams["segmentation"].parse(source.load(0).images[0, 1]) == 3).all()


@pytest.mark.parametrize(
    ("columns", "parameters", "message"),
    [
        ({"a": [b"x"], "b": [b"y"]}, {}, r"columns of bytes are \['a', 'b'\]; name that of each stream"),
        ({"a": [1]}, {}, r"columns of bytes are \[\]"),
        ({"a": [1]}, {"streams": {"rgb": "a"}}, "column 'a' is int64; expected bytes"),
        ({"a": [b"x"]}, {"streams": {"rgb": "c"}}, r"no column 'c'; it has \['a'\]"),
        ({"a": [b"x"]}, {"key": "id"}, "no column 'id'"),
        ({"a": [b"x"]}, {"streams": {"depth": "a"}}, "lack rgb"),
        ({"a": pa.array([None], pa.binary())}, {}, "no rows to use in its files: column 'a' is null"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path, columns, parameters, message) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        ParquetSource(small, path=str(tmp_path), **parameters)


def test_a_file_that_is_no_parquet_is_listed(tmp_path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"image": [encode_image(photo())]}), tmp_path / "b.parquet")
    (tmp_path / "notes.txt").write_text("x")
    source = ParquetSource(small, path=str(tmp_path))
    assert [failure.key for failure in source.skipped] == ["notes.txt", "a.parquet"]
    assert not any(str(tmp_path) in failure.reason for failure in source.skipped)
    with pytest.raises(UserError, match="no rows to use in its files: no Parquet that can be read"):
        ParquetSource(small, path=str(tmp_path / "a.parquet"))


# --- JSONL.


def test_lines_are_scenes_of_codes(tmp_path) -> None:
    rng = np.random.default_rng(0)
    sentences = [rng.integers(0, 16, (frames, 4), dtype=np.uint16) for frames in (3, 1)]
    bad = ["{}\n", "\n", jsonl.encode_line(np.full((1, 4), 16)), jsonl.encode_line(np.zeros((1, 3)))]
    (tmp_path / "a.jsonl").write_text(
        jsonl.encode_line(sentences[0]) + "".join(bad) + jsonl.encode_line(sentences[1])
    )
    source = open_any_source(str(tmp_path / "a.jsonl"), small, {"num_codes": 16, "grid": (2, 2)})
    assert [source.info(i).key for i in range(len(source))] == ["a.jsonl/1", "a.jsonl/6"]
    assert [source.info(i).num_frames for i in range(2)] == [3, 1]
    for index, codes in enumerate(sentences):
        scene = source.load_codes(index)
        assert scene.codes.dtype == np.uint16
        np.testing.assert_array_equal(scene.codes[:, 0], codes)
    assert [(failure.key, failure.reason) for failure in source.skipped] == [
        ("a.jsonl/2", "not {'tokens': base64}: 'tokens'"),
        ("a.jsonl/4", "codes are in [16, 16], expected [0, 16) (num_codes)"),
        ("a.jsonl/5", "3 tokens are not a multiple of 4 codes per image (grid)"),
    ]


def test_equal_lines_are_of_one_group_and_changed_ones_are_failures(tmp_path) -> None:
    line = jsonl.encode_line(np.zeros((2, 4)))
    path = tmp_path / "a.jsonl"
    path.write_text(line * 2)
    source = open_any_source(str(path), small, {"num_codes": 16, "grid": (2, 2)})
    assert source.info(0).group == source.info(1).group
    assert source.info(0).key != source.info(1).key
    path.write_text("x" * len(line) * 2)
    scene = source.load_codes(1)
    assert scene.codes.shape == (0, 1, 4)
    assert scene.failures[0].key == "a.jsonl/2"


def test_codes_are_no_images(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl.encode_line(np.zeros((1, 256))))
    with pytest.raises(UserError, match="holds ready codes, not images"):
        open_source(str(tmp_path / "a.jsonl"), small)
    with pytest.raises(UserError, match="derived: streams are computed from images"):
        open_any_source(str(tmp_path / "a.jsonl"), small, {"derived": ("gray",)})
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"no line of its files is a sentence of codes; a\.jsonl/1: not"):
        open_any_source(str(tmp_path / "a.jsonl"), small)
