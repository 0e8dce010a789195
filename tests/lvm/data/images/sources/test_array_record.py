"""ArrayRecord source."""

from __future__ import annotations

import os
import pathlib

import pytest
from array_record.python import array_record_module

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import array_record, open_source
from tests.image_files import BAD_FILES, UNUSUAL_FILES, check_copies, check_image_files, encode_image, photo

small = Preprocess(16)
FILES = {name: content for name, (content, _) in (BAD_FILES | UNUSUAL_FILES).items()}


def write_records(path: pathlib.Path, records: list[bytes]) -> pathlib.Path:
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def test_records_are_image_files(tmp_path) -> None:
    write_records(tmp_path / "a.array_record", list(FILES.values()))
    source = open_source(str(tmp_path / "a.array_record"), small)
    check_image_files(source, lambda key: list(FILES)[int(key.removeprefix("a.array_record/"))])
    assert source.stream_sets == (("rgb",),)


def test_few_record_files_are_open_at_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(array_record, "_OPEN_READERS", 4)
    for i in range(12):
        write_records(tmp_path / f"{i}.array_record", [encode_image(photo(8, 8))])
    source = open_source(str(tmp_path), small)

    def num_open() -> int:
        links = pathlib.Path("/proc/self/fd").iterdir()
        return sum(str(link.readlink()).startswith(str(tmp_path)) for link in links if link.is_symlink())

    assert num_open() == 0, "listing keeps none"
    for i in (*range(12), *range(10)):
        assert not source.load(i).failures
    assert num_open() == 4
    for i in (7, 8):  # copies that are released
        (tmp_path / f"{i}.array_record").unlink()
    assert not source.load(11).failures
    assert num_open() == 2, "9 and 11"


def test_unreadable_record_files_are_skipped(tmp_path) -> None:
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
    with pytest.raises(UserError, match="no usable record"):
        open_source(str(tmp_path), small)
