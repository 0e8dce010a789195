"""Parquet source."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_source
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


RGB = encode_image(photo())


def structs(of: pa.DataType) -> pa.Array:
    return pa.array([{"bytes": RGB}, None, {"bytes": None}], pa.struct([("bytes", of)]))


COLUMNS = {
    "large_binary": pa.array([RGB, None, None], pa.large_binary()),
    "binary_view": pa.array([RGB, None, None], pa.binary_view()),
    "fixed_size": pa.array([RGB, None, None], pa.binary(len(RGB))),
    "dictionary": pa.array([RGB, None, None]).dictionary_encode(),
    "large_dictionary": pa.array([RGB, None, None], pa.large_binary()).dictionary_encode(),
    "struct": structs(pa.binary()),
    "struct_of_views": structs(pa.binary_view()),
    "struct_of_large": structs(pa.large_binary()),
    "struct_of_fixed": structs(pa.binary(len(RGB))),
}


@pytest.mark.parametrize("of", list(COLUMNS))
@pytest.mark.parametrize("parameters", [{}, {"streams": {"rgb": "image"}}])
def test_every_type_of_bytes_is_read(tmp_path, of, parameters) -> None:
    pq.write_table(pa.table({"image": COLUMNS[of]}), tmp_path / "a.parquet")
    source = ParquetSource(small, path=str(tmp_path), **parameters)
    np.testing.assert_array_equal(source.load(0).images[0, 0], small(photo()))
    reasons = {failure.key: failure.reason for failure in source.skipped}
    assert reasons == {f"a.parquet/{row}": "column 'image' is null" for row in (1, 2)}


@pytest.mark.parametrize(
    "of", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_every_type_of_text_is_a_key(tmp_path, of) -> None:
    names = pa.array(["a", "b"]).dictionary_encode().cast(of) if "dict" in str(of) else pa.array(["a", "b"], of)
    columns = {"id": names, "image": [RGB, RGB], "md5": pa.array([b"01", b"23"], pa.binary(2))}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = ParquetSource(small, path=str(tmp_path), key="id", class_name="id")
    assert [source.info(i).key for i in range(2)] == ["a", "b"]
    assert source.classes == ("a", "b")
    with pytest.raises(UserError, match=r"column 'id' is .*paths are not followed"):
        len(ParquetSource(small, path=str(tmp_path), streams={"rgb": "id"}))


def test_paths_without_bytes_are_named(tmp_path) -> None:
    fields = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": None, "path": "x/1.png"}, {"bytes": RGB, "path": "x/2.png"}, None]
    pq.write_table(pa.table({"image": pa.array(images, fields)}), tmp_path / "a.parquet")
    source = ParquetSource(small, path=str(tmp_path))
    path, null = source.skipped
    assert path.reason.startswith("column 'image' holds the path 'x/1.png' and no bytes; embed")
    assert (path.key, null.key, null.reason) == ("a.parquet/0", "a.parquet/2", "column 'image' is null")
    pq.write_table(pa.table({"image": pa.array(images[:1], fields)}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no usable row \(a\.parquet/0: .* 'x/1\.png' and no bytes"):
        len(ParquetSource(small, path=str(tmp_path)))


@pytest.mark.parametrize("of", [pa.null(), pa.binary()])
@pytest.mark.parametrize("parameters", [{}, {"streams": {"rgb": "image", "depth": "depth"}}])
def test_column_that_is_null_everywhere_is_listed(tmp_path, of, parameters) -> None:
    table = pa.table({"image": [RGB, RGB], "depth": pa.array([None, None], of)})
    pq.write_table(table, tmp_path / "a.parquet")
    source = ParquetSource(small, path=str(tmp_path), **parameters)
    assert source.stream_sets == (("rgb",),)
    assert [(failure.key, failure.reason) for failure in source.skipped] == [
        ("depth", "no scene has this stream: nothing in 'depth'")
    ]
    depth = encode_image(np.full((32, 48), 1000, np.uint16))
    pq.write_table(pa.table({"image": [RGB], "depth": [depth]}), tmp_path / "b.parquet")  # the next file has some
    source = ParquetSource(small, path=str(tmp_path), **parameters)
    assert source.stream_sets == (("rgb",), ("rgb", "depth"))
    assert source.skipped == ()
    assert all(source.load(i).failures == () for i in range(3))


def test_column_that_the_first_file_lacks_is_listed(tmp_path) -> None:
    pq.write_table(pa.table({"image": [RGB]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [RGB], "depth": [RGB], "pose": [7]}), tmp_path / "b.parquet")
    (failure,) = ParquetSource(small, path=str(tmp_path)).skipped
    assert (failure.key, failure.reason) == ("b.parquet", "column 'depth' is not read: the first file has none")


@pytest.mark.parametrize("order", [("rgb", "edges"), ("edges", "rgb")])
def test_streams_have_the_order_of_the_config_file(tmp_path, order) -> None:
    wide, columns = encode_image(photo(96, 32)), {"rgb": "b", "edges": "a"}
    pq.write_table(pa.table({"a": [RGB, wide], "b": [RGB, RGB]}), tmp_path / "a.parquet")
    config = tmp_path / "source.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(dict(kind='parquet', path='{tmp_path}/a.parquet',\n"
        f"        streams={ {stream: columns[stream] for stream in order} }))\n"
    )
    source = open_source(str(config), small)
    assert source.info(0).streams == tuple(source.streams) == order
    images = source.load(0).images[0]
    np.testing.assert_array_equal(images[order.index("rgb")], small(photo()))
    (failure,) = source.load(1).failures  # of the file that differs from rgb
    assert "96×32 differs in aspect ratio from its rgb, 48×32" in failure.reason


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
        len(ParquetSource(small, path=str(tmp_path), **parameters))


def test_malformed_parquet_is_skipped(tmp_path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"image": [encode_image(photo())]}), tmp_path / "b.parquet")
    (tmp_path / "notes.txt").write_text("x")
    source = ParquetSource(small, path=str(tmp_path))
    assert [failure.key for failure in source.skipped] == ["notes.txt", "a.parquet"]
    assert not any(str(tmp_path) in failure.reason for failure in source.skipped)
    with pytest.raises(UserError, match=r"no usable row \(a\.parquet: can't be read"):
        len(ParquetSource(small, path=str(tmp_path / "a.parquet")))


def test_rows_of_every_group_are_found(tmp_path) -> None:
    images = [encode_image(np.full((8, 8, 3), 40 * row, np.uint8)) for row in range(6)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", row_group_size=2)
    source = ParquetSource(small, path=str(tmp_path / "a.parquet"))
    assert [source.info(i).key for i in range(len(source))] == [f"a.parquet/{row}" for row in range(6)]
    assert [source.load(i).images.mean() for i in range(6)] == [40 * row for row in range(6)]
