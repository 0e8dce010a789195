"""Atomic files, locks, JSON, object storage."""

import errno
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
def test_json_round_trip(value, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "value.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


def test_write_json_equal_values_equal_bytes(tmp_path):
    files.write_json(tmp_path / "a", {"x": 1, "y": [2]})
    files.write_json(tmp_path / "b", {"y": (2,), "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_write_atomically_replaces_and_leaves_no_temporary(tmp_path):
    files.write_atomically(tmp_path / "file", b"old, and longer")
    files.write_atomically(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"new"


def test_failed_write_names_file_and_leaves_no_temporary(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        files.write_atomically(tmp_path / "taken", b"data")
    assert os.listdir(tmp_path) == ["taken"]


def test_write_atomically_replaces_only_after_flushing(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: calls.append("fsync") or sync(descriptor))
    monkeypatch.setattr(files.os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    files.write_atomically(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]  # the file, then its folder

    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="file"):
        files.write_atomically(tmp_path / "file", b"newer")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_concurrent_atomic_writers_are_safe(tmp_path):
    with files.atomic_file(tmp_path / "file") as first, files.atomic_file(tmp_path / "file") as second:
        first.write(b"the first writer's")
        second.write(b"the second's")
    assert (tmp_path / "file").read_bytes() == b"the first writer's"  # it was the last to finish
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("content", [b'{"a": ', b"", b"\0\0\0\0", b'{"a": "\xff"}'])
def test_read_json_names_malformed_file(tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.json: not JSON"):
        files.read_json(tmp_path / "bad.json")


@pytest.mark.parametrize("content", [None, b"\0\0\0\0", b"[1]"])
def test_side_file_that_is_no_object_is_empty(tmp_path, content):
    path = tmp_path / "side.json"
    if content is not None:
        path.write_bytes(content)
    assert files.read_side_file(path) == {}
    files.write_json(path, {"a": 1})
    assert files.read_side_file(path) == {"a": 1}


def test_file_size_needs_no_owner_name(tmp_path, monkeypatch):
    def unknown_user(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown_user)
    (tmp_path / "file").write_bytes(b"1234")
    assert files.file_size(epath.Path(tmp_path / "file")) == 4
    assert files.file_size(tmp_path / "none") is None
    assert files.file_size(tmp_path / "file" / "none") is None


def test_as_json_round_trips_value():
    assert files.as_json({"a": (1, 2), 3: None}) == {"a": [1, 2], "3": None}


def test_sha256_of_content(tmp_path):
    (tmp_path / "file").write_bytes(b"some bytes")
    assert files.sha256(tmp_path / "file") == hashlib.sha256(b"some bytes").hexdigest()


def test_flush_keeps_content(tmp_path):
    (tmp_path / "file").write_bytes(b"some bytes")
    files.flush(tmp_path / "file")
    files.sync_folder(tmp_path)
    assert (tmp_path / "file").read_bytes() == b"some bytes"


def test_gcs_object_round_trip(gcs, tmp_path):
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


def test_is_remote_by_scheme():
    assert files.is_remote("gs://bucket/a")
    assert not files.is_remote("/tmp/a")
    assert not files.is_remote("a")


def test_atomic_file_keeps_old_content_on_error(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail() -> None:
        with files.atomic_file(path) as file:
            file.write(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"old"
    with files.atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_lock_file_excludes_until_closed(tmp_path):
    path = tmp_path / "lock"
    first = files.lock_file(path)
    assert first is not None
    assert files.lock_file(path) is None
    assert files.is_locked(path)
    first.close()
    assert files.is_locked(path) is False
    with files.lock_file(path, wait=True) as last:
        assert not last.closed


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_lock_file_warns_once_without_file_locks(tmp_path, no_file_locks, caplog, code):
    no_file_locks(code)
    for name in ("a", "b"):
        with files.lock_file(tmp_path / name, wait=True) as file:
            assert not file.closed
    assert files.is_locked(tmp_path / "a") is None
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [str(tmp_path)]


def test_lock_file_raises_other_errors(tmp_path, no_file_locks):
    no_file_locks(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        files.lock_file(tmp_path / "a")
