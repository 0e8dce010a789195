"""Folders of a source's files, local ones and those of object storage: naming, copies, outages, gs:// and s3://."""

import errno
import functools
import hashlib
import http.server
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import threading

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvm.common.errors import UnavailableError, UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import finding, open_any_source, open_source, remote
from lvm.data.images.sources.folders import Folder
from lvm.data.images.sources.image_file import UnreadableError
from tests.image_files import encode_image, photo
from tests.lvm.data.images.sources.test_tar import write_tar
from tests.object_server import object_server

small = Preprocess(16)
RGB = encode_image(photo(), "JPEG")
FILES = ["10.tar", "2.tar", "a/1.tar", "a/.hidden.tar", "b/notes.txt"]


def ignore(path: str, reason: str) -> None:
    pass


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    """A TMPDIR of the test, and retries without waiting; yields the folder."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(remote, "_RETRY_DELAYS_S", (0.0, 0.0))
    yield tmp_path / "tmp"
    tempfile.tempdir = None


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> pathlib.Path:
    """A folder that object servers serve as buckets: tars, photos, Parquet."""
    folder = tmp_path_factory.mktemp("served")
    for name in FILES:
        if name.endswith(".tar"):
            write_tar(folder / "bucket" / "t" / name, [(f"{i}.jpg", RGB) for i in range(3)])
    (folder / "bucket" / "t" / "b").mkdir()
    (folder / "bucket" / "t" / "b" / "notes.txt").write_text("a note")
    (folder / "bucket" / "photos").mkdir()
    for i in range(3):
        (folder / "bucket" / "photos" / f"{i}.jpg").write_bytes(RGB)
    (folder / "bucket" / "photos" / "classes.json").write_text(json.dumps({"0": "wall"}))
    (folder / "bucket" / "q").mkdir()
    pq.write_table(pa.table({"image": [RGB] * 4}), folder / "bucket" / "q" / "a.parquet", row_group_size=1)
    return folder


@pytest.fixture
def server(bucket):
    with object_server(bucket) as running:
        yield running


@pytest.fixture
def memory():
    """A folder of fsspec's in-memory file system."""
    filesystem = fsspec.filesystem("memory")
    for name in FILES:
        filesystem.pipe_file(f"/data/{name}", name.encode())
    yield "memory://data"
    filesystem.rm("/data", recursive=True)


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize(
    ("path", "root", "names"),
    [
        ("", "", ["2.tar", "10.tar", "a/1.tar", "b/notes.txt"]),
        ("/a", "/a", ["1.tar"]),
        ("/2.tar", "", ["2.tar"]),
        ("/*.tar", "", ["2.tar", "10.tar"]),
        ("/?/*.t?r", "", ["a/1.tar"]),
        ("/none", "", []),
    ],
)
def test_locate_names_files_in_natural_order(tmp_path, memory, where, path, root, names) -> None:
    base = memory if where == "memory" else str(tmp_path / "data")
    for name in FILES:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(name.encode())
    folder, located = finding.locate(base + path, ignore)
    assert located == names
    if located:
        assert folder.local(located[0]).read_bytes().decode() == f"{root.strip('/')}/{located[0]}".lstrip("/")
        assert str(folder) == base + root


def test_find_files_lists_others_and_names_what_is_missing(memory) -> None:
    skipped = {}
    folder, names = finding.find_files(memory, (".tar",), skipped.__setitem__)
    assert (folder.name, names) == ("data", ["2.tar", "10.tar", "a/1.tar"])
    assert skipped == {"b/notes.txt": "does not end in .tar"}
    with pytest.raises(UserError, match=r"memory://data/none: found nothing there; .*\.tar"):
        finding.find_files(f"{memory}/none", (".tar",), ignore)


def test_copies_stay_until_their_last_release(memory, copies) -> None:
    folder, _ = finding.locate(memory, ignore)
    for _ in range(2):
        path = folder.hold("a/1.tar")
    assert path.read_bytes() == b"a/1.tar"
    folder.release("a/1.tar")
    assert path.exists()
    other = pickle.loads(pickle.dumps(folder))
    assert other.local("a/1.tar") == path
    assert other.read("2.tar") == b"2.tar"
    del other
    folder.release("a/1.tar")
    assert not path.exists()
    assert len(list(copies.iterdir())) == 1
    del folder
    assert not list(copies.iterdir())


def test_missing_object_is_unreadable(memory) -> None:
    folder, _ = finding.locate(memory, ignore)
    for read in (folder.read, folder.local, folder.hold):
        with pytest.raises(UnreadableError, match="no such object"):
            read("none.tar")


def test_copies_of_killed_processes_are_removed(copies, memory) -> None:
    program = (
        "import os, fsspec; from lvm.data.images.sources import finding; "
        "fsspec.filesystem('memory').pipe_file('/x/1.tar', b'1'); "
        "folder, _ = finding.locate('memory://x', print); folder.local('1.tar'); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program], env=os.environ | {"TMPDIR": str(copies)}, check=False)
    assert killed.returncode == -9
    (left,) = copies.iterdir()
    assert (left / "1.tar").read_bytes() == b"1"
    running, _ = finding.locate(memory, ignore)
    assert not left.exists()
    finding.locate(memory, ignore)
    assert running.path.exists()


@pytest.mark.parametrize("spec", ["gs://bucket/t", "gs://bucket/t/*.tar", "gs://bucket/t/2.tar", "s3://bucket/t"])
def test_remote_tars_equal_local_ones(server, bucket, copies, spec) -> None:
    local = open_any_source(f"{bucket}/{spec.partition('://')[2]}", small)
    source = open_any_source(spec, small)
    assert source.kind == "tar"
    assert len(source._files) == len(local._files)
    part, expected = (each.part(each.plan(0, 2)[0]) for each in (source, local))
    worker = pickle.loads(pickle.dumps(source.for_workers()))
    assert [source.info(scene) for scene in part.scenes] == [local.info(scene) for scene in expected.scenes]
    for scene, expected_scene in zip(part.scenes, expected.scenes, strict=True):
        np.testing.assert_array_equal(worker.load(scene).images, local.load(expected_scene).images)
    assert list(copies.rglob("*.tar"))
    part.release()
    assert not list(copies.rglob("*.tar"))


@pytest.mark.parametrize("spec", ["gs://bucket/photos", "s3://bucket/photos", "gs://bucket/q"])
def test_remote_images_equal_local_ones(server, bucket, spec) -> None:
    source, local = open_source(spec, small), open_source(f"{bucket}/{spec.partition('://')[2]}", small)
    assert [source.info(i) for i in range(len(source))] == [local.info(i) for i in range(len(local))]
    worker = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(worker.load(source._scene(0)).images, local.load(0).images)


@pytest.mark.parametrize("spec", ["gs://bucket/t", "gs://bucket/photos", "s3://bucket/t/*.tar"])
def test_remote_source_is_listed_once(server, spec) -> None:
    server.keep_log = True
    open_any_source(spec, small)
    listings = [path for method, path, _ in server.log if path.rstrip("/").endswith(("/b/bucket/o", "/bucket"))]
    assert len(listings) <= 2, "one of the folder, and one that looks for an object of its name"


def test_copies_are_compared_with_their_checksums(server) -> None:
    folder, _ = finding.locate("gs://bucket/t", ignore)
    content = server["bucket/t/2.tar"]
    server["bucket/t/2.tar"] = b"?" + content[1:]
    with pytest.raises(UnavailableError, match=r"t/2\.tar: its content differs from its checksum"):
        folder.local("2.tar")
    with pytest.raises(UnavailableError, match=r"t/2\.tar: its content differs from its checksum"):
        folder.read("2.tar")
    server["bucket/t/2.tar"] = content
    assert folder.local("2.tar").read_bytes() == content


def test_object_of_another_size_is_named(server) -> None:
    folder, _ = finding.locate("s3://bucket/t", ignore)
    server["bucket/t/2.tar"] = b"short"
    with pytest.raises(UnavailableError, match=r"2\.tar: 5 bytes were read, and 10240 were listed"):
        folder.local("2.tar")


@pytest.mark.parametrize("spec", ["gs://bucket/t", "gs://bucket/photos", "gs://bucket/q"])
def test_outage_ends_the_process(server, monkeypatch, spec) -> None:
    source = open_any_source(spec, small)
    scenes = source.part(source.plan(0, 1)[0]).scenes if source.is_listed else ()

    def unavailable(*args: object, **options: object) -> None:
        raise OSError("503")

    for name in ("get_file", "cat_file"):
        monkeypatch.setattr(remote.filesystem_of(spec)[0], name, unavailable)
    with pytest.raises(UnavailableError, match="503"):
        source.load(source._scene(scenes[0])) if source.is_listed else source.part(source.plan(0, 1)[0])


@pytest.mark.parametrize("spec", ["s3://bucket/t", "s3://bucket/photos"])
def test_expired_credentials_end_the_process(server, monkeypatch, spec) -> None:
    """Each file that is listed as a failure would be missing from a store that is complete."""
    source = open_any_source(spec, small)

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError("The provided token has expired.")

    for name in ("get_file", "cat_file", "find"):
        monkeypatch.setattr(remote.filesystem_of(spec)[0], name, refuse)
    with pytest.raises(UnavailableError, match="token has expired"):
        source.load(source._scene(0)) if source.is_listed else source.part(source.plan(0, 1)[0])
    with pytest.raises(UserError, match=f"{spec}: can't be listed: .*token has expired"):
        open_any_source(spec, small)


def test_outage_while_listing_is_no_user_error(server, monkeypatch) -> None:
    def unavailable(*args: object, **options: object) -> None:
        raise OSError("503")

    monkeypatch.setattr(remote.filesystem_of("gs://bucket/t")[0], "find", unavailable)
    with pytest.raises(UnavailableError, match="gs://bucket/t: can't be listed: OSError: 503"):
        open_any_source("gs://bucket/t", small)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("spec", ["t", "photos", "q", "t/*.tar"])
def test_error_of_the_machine_is_no_failure_of_a_file(bucket, monkeypatch, spec, code) -> None:
    source = open_any_source(f"{bucket}/bucket/{spec}", small)

    def fail(path: object, *args: object, **options: object) -> None:
        raise OSError(code, os.strerror(code), path)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fail)
        patch.setattr(pq, "ParquetFile", fail)
        with pytest.raises(UnavailableError, match=os.strerror(code)):
            source.load(source._scene(0)) if source.is_listed else source.part(source.plan(0, 1)[0])
        with pytest.raises(UnavailableError, match=os.strerror(code)):
            source.describe()


def test_unlisted_url_is_a_user_error(server, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"gs://bucket/none: found nothing there"):
        open_any_source("gs://bucket/none", small)
    with pytest.raises(UserError, match=r"nosuch://bucket/x: "):
        open_any_source("nosuch://bucket/x", small)

    def no_package(*args: object, **options: object) -> None:
        raise ImportError("install s3fs", name="s3fs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", no_package)
    with pytest.raises(UserError, match=r"s3://bucket/t: .*s3fs.*lvm\[s3\]"):
        open_any_source("s3://bucket/t", small)


@pytest.mark.parametrize("name", ["t/2.tar", "t/"])
def test_tars_of_a_web_server_are_read(bucket, name) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=bucket / "bucket")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        source = open_any_source(f"http://127.0.0.1:{web.server_port}/{name}", small)
        scenes = source.part(source.plan(0, 1)[0]).scenes
        assert source.describe()["num_files"] == len(source._files) > 0
        assert not source.load(scenes[0]).failures
        web.shutdown()


def test_refused_connection_is_no_traceback() -> None:
    with pytest.raises(UnavailableError, match=r"^ftp://127\.0\.0\.1:1/x: ConnectionRefusedError"):
        open_any_source("ftp://127.0.0.1:1/x", small)


def test_settings_errors_name_the_url(memory) -> None:
    fsspec.filesystem("memory").pipe_file("/data/classes.json", b"{")
    fsspec.filesystem("memory").pipe_file("/data/1.jpg", RGB)
    with pytest.raises(UserError, match=r"^memory://data/classes\.json: "):
        open_any_source(f"{memory}", small, {"layout": "videos"})


@pytest.mark.parametrize("tail_bytes", [256, 65536])
def test_hash_of_files_is_that_of_sizes_and_ends(tmp_path, tail_bytes) -> None:
    contents = {f"{i}.tar": bytes([i]) * (100_000 + i) for i in range(3)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    names = [(name, name) for name in [*contents, "missing"]]
    parts = [f"{name} {len(content)}\n".encode() + content[-tail_bytes:] for name, content in contents.items()]
    expected = hashlib.sha256(b"".join([*parts, b"missing 0\n"])).hexdigest()
    assert finding.hash_files(Folder(tmp_path), names, tail_bytes) == expected


def test_ends_of_files_are_read_at_once(tmp_path, monkeypatch) -> None:
    barrier = threading.Barrier(8, timeout=60)

    def stamp(folder: Folder, file: str, tail_bytes: int) -> tuple[int, bytes]:
        barrier.wait()  # until eight calls wait
        return 1, file.encode()

    monkeypatch.setattr(Folder, "stamp", stamp)
    assert finding.hash_files(Folder(tmp_path), [(str(i), str(i)) for i in range(16)], 65536)


def test_local_folder_names_its_entries(tmp_path) -> None:
    for name in ("10", "2", ".hidden"):
        (tmp_path / "data" / name).mkdir(parents=True)
    folder = Folder(tmp_path / "data")
    assert folder.entries() == ["2", "10"]
    assert folder.is_folder("10")
    assert not folder.is_folder("3")
    assert finding.open_folder(str(tmp_path / "none")) is None
