"""Files are whole or absent, and equal values are equal bytes."""

import hashlib
import os

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from lvm.common import files
from lvm.common.errors import UserError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(value=json_values)
def test_json_comes_back_equal(value, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "value.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


def test_equal_values_are_equal_bytes(tmp_path):
    files.write_json(tmp_path / "a", {"x": 1, "y": [2]})
    files.write_json(tmp_path / "b", {"y": (2,), "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_writing_replaces_and_leaves_nothing_else(tmp_path):
    files.write_atomically(tmp_path / "file", b"old, and longer")
    files.write_atomically(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_write_that_fails_names_the_file_and_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        files.write_atomically(tmp_path / "taken", b"data")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "bad.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"bad\.json: not JSON"):
        files.read_json(tmp_path / "bad.json")


def test_as_json_is_what_json_gives_back():
    assert files.as_json({"a": (1, 2), 3: None}) == {"a": [1, 2], "3": None}


def test_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "file").write_bytes(b"some bytes")
    assert files.sha256(tmp_path / "file") == hashlib.sha256(b"some bytes").hexdigest()


def test_flushing_changes_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"some bytes")
    files.flush(tmp_path / "file")
    files.sync_folder(tmp_path)
    assert (tmp_path / "file").read_bytes() == b"some bytes"


def test_an_object_is_written_whole_and_read_back(gcs, tmp_path):
    path = f"{gcs}/a/value.json"
    files.write_json(path, {"x": 1})
    assert files.read_json(path) == {"x": 1}
    files.write_json(path, {"x": 2})  # whoever looked before sees it
    assert files.read_json(path) == {"x": 2}
    assert [child.name for child in epath.Path(f"{gcs}/a").iterdir()] == ["value.json"]
    large = os.urandom(2**20) * 12  # more than fits one request
    (tmp_path / "large").write_bytes(large)
    files.put(tmp_path / "large", f"{gcs}/a/large")
    assert files.sha256(f"{gcs}/a/large") == hashlib.sha256(large).hexdigest()
    files.download(f"{gcs}/a/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large
    with pytest.raises(FileNotFoundError):
        files.download(f"{gcs}/a/none", tmp_path / "none")


def test_what_is_remote_is_told_by_its_name():
    assert files.is_remote("gs://bucket/a")
    assert not files.is_remote("/tmp/a")
    assert not files.is_remote("a")
