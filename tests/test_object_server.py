"""The object server of tests: gs:// through gcsfs and TensorStore, plain ranges, and injected faults."""

import http.client
import time
import urllib.request

import fsspec
import pytest
import tensorstore
from etils import epath

from lvm.common import files
from tests.object_server import Faults, object_server


def test_object_server_serves_gcsfs(tmp_path):
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    (tmp_path / "served" / "bucket" / "old").write_bytes(b"old")
    with object_server(tmp_path / "served") as server:
        epath.Path("gs://bucket/folder/a").write_bytes(b"small\n")
        (tmp_path / "large").write_bytes(bytes(2**23))
        files.put(tmp_path / "large", "gs://bucket/folder/large")
        assert epath.Path("gs://bucket/folder/a").read_bytes() == b"small\n" == server["bucket/folder/a"]
        assert files.file_size("gs://bucket/folder/large") == 2**23
        assert sorted(files.objects("gs://bucket/folder")) == ["a", "large"]
        assert sorted(path.name for path in epath.Path("gs://bucket").iterdir()) == ["folder", "old"]
        filesystem = fsspec.filesystem("gs")
        assert filesystem.cat_file("bucket/folder/a", start=1, end=3) == b"ma"
        with pytest.raises(FileExistsError):
            filesystem.pipe_file("bucket/folder/a", b"other", mode="create")
        filesystem.rm(["bucket/folder/a", "bucket/old"])
        assert server.paths() == ["bucket/folder/large"]
        assert not epath.Path("gs://bucket/old").exists()
    assert (tmp_path / "served" / "bucket" / "old").exists()


@pytest.mark.parametrize("kind", ["gcs", "s3", "http"])
def test_object_server_serves_ranges_of_tensorstore(kind):
    with object_server() as server:
        server["bucket/a/b"] = bytes(range(200))
        spec = {
            "gcs": {"driver": "gcs", "bucket": "bucket", "path": "a/"},
            "s3": {"driver": "s3", "bucket": "bucket", "path": "a/", "endpoint": server.url, "aws_region": "us-east-1"},
            "http": {"driver": "http", "base_url": f"{server.url}/bucket/a/"},
        }[kind]
        store = tensorstore.KvStore.open(spec).result()
        assert store.read("b", byte_range=slice(10, 14)).result().value == bytes([10, 11, 12, 13])
        assert store.read("absent").result().state == "missing"
        assert server.counts["bytes"] < 200


def test_object_server_injects_faults():
    with object_server(faults=Faults(latency_s=0.2)) as server:
        server["bucket/a"] = b"abc"
        start = time.monotonic()
        assert urllib.request.urlopen(f"{server.url}/bucket/a").read() == b"abc"
        assert time.monotonic() - start >= 0.2
        server.faults = Faults(error_share=1.0)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{server.url}/bucket/a")
        server.faults = Faults(drop_share=1.0)
        with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            urllib.request.urlopen(f"{server.url}/bucket/a")
        server.faults = Faults(flip_share=1.0)
        assert urllib.request.urlopen(f"{server.url}/bucket/a").read() == b"`bc"
        assert server.counts["requests"] == 4
