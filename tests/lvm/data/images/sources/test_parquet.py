"""Parquet source."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.parquet import ParquetSource
from tests.image_files import BAD_FILES, UNUSUAL_FILES, check_copies, check_image_files, encode_image, photo

small = Preprocess(16)
FILES = {name: content for name, (content, _) in (BAD_FILES | UNUSUAL_FILES).items()}
IDS = encode_image(np.full((32, 48), 3, np.uint8))


def test_rows_are_image_files(tmp_path) -> None:
    table = pa.table({"image": list(FILES.values()), "name": list(FILES)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    source = ParquetSource(small, path=str(tmp_path / "a.parquet"), key="name")
    check_image_files(source)
    check_copies(ParquetSource(small, path=str(tmp_path), streams={"rgb": "image"}))


def test_no_row_of_a_damaged_file_is_used(tmp_path) -> None:
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


def test_struct_key_group_and_class_columns(tmp_path) -> None:
    rgb = {"bytes": encode_image(photo()), "path": "x.png"}
    table = pa.table(
        {
            "image": pa.array([rgb, rgb, None, rgb], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
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
        ({"a": [b"x"], "b": [b"y"]}, {}, "columns of images are a, b"),
        ({"a": [1]}, {}, "columns of images are none"),
        ({"a": [1]}, {"streams": {"rgb": "a"}}, "column 'a' is int64; expected bytes"),
        ({"a": [b"x"]}, {"streams": {"rgb": "c"}}, "no column 'c'"),
        ({"a": [b"x"]}, {"key": "id"}, "no column 'id'"),
        ({"a": [b"x"]}, {"streams": {"depth": "a"}}, r"parquet\.streams: \['depth'\]"),
        ({"a": pa.array([None], pa.binary())}, {}, r"no usable row \(a\.parquet/0: column 'a' is null"),
    ],
)
def test_parquet_rejects_bad_columns(tmp_path, columns, parameters, message) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        ParquetSource(small, path=str(tmp_path), **parameters)


def test_malformed_parquet_is_skipped(tmp_path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"image": [encode_image(photo())]}), tmp_path / "b.parquet")
    (tmp_path / "notes.txt").write_text("x")
    source = ParquetSource(small, path=str(tmp_path))
    assert [failure.key for failure in source.skipped] == ["notes.txt", "a.parquet"]
    assert not any(str(tmp_path) in failure.reason for failure in source.skipped)
    with pytest.raises(UserError, match=r"no usable row \(a\.parquet: can't be read"):
        ParquetSource(small, path=str(tmp_path / "a.parquet"))
