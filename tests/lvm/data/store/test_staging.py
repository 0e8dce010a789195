"""Staging: shards are copied to local disk once, checked, and only when they are read."""

import concurrent.futures
import pathlib
import pickle

import numpy as np
import pytest
from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.mixture.mixture import ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.recipes import Single
from lvm.data.store import staging, writer
from lvm.data.store.reader import Store
from lvm.data.store.verify import find_problems

SHAPES = [(1, 0)] * 70 + [(3, 0), (1, 1)] + [(2, 2), (1, 0)]


def upload(folder, bucket):
    for file in pathlib.Path(folder).iterdir():
        files.put(file, f"{bucket}/store/{file.name}")
    return f"{bucket}/store"


def names(folder):
    return sorted(path.name for path in pathlib.Path(folder).rglob("shard-*"))


def test_remote_store_is_read_from_staged_shards(gcs, make_store, tmp_path):
    local = make_store(SHAPES, num_shards=3)
    store = Store(upload(local, gcs), str(tmp_path / "staged"))
    assert len(store) == len(SHAPES)
    assert not (tmp_path / "staged").exists()  # opening reads no shard
    np.testing.assert_array_equal(store.scene(0).codes, Store(local).scene(0).codes)
    assert names(tmp_path / "staged") == [f"shard-00000-of-00003{suffix}" for suffix in (".codes", ".index")]
    for i in range(len(store)):
        np.testing.assert_array_equal(store.scene(i).codes, Store(local).scene(i).codes)
    assert len(names(tmp_path / "staged")) == 6
    for child in epath.Path(f"{gcs}/store").iterdir():
        if child.name not in ("manifest.json", "manifest.index"):
            child.unlink()
    reopened = pickle.loads(pickle.dumps(store))  # as for a worker; staged shards are reused
    np.testing.assert_array_equal(reopened.scene(5).codes, Store(local).scene(5).codes)


def test_staging_rejects_a_copy_unlike_the_manifest(make_store, tmp_path):
    folder = pathlib.Path(make_store(SHAPES, num_shards=1))
    file = folder / "shard-00000-of-00001.codes"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    store = Store(folder, str(tmp_path / "staged"))
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{file}: damaged: .* {len(data)} bytes"):
            store.scene(0)
    assert names(tmp_path / "staged") == ["shard-00000-of-00001.index"]
    file.unlink()
    with pytest.raises(UserError, match=rf"{file}: is missing"):
        store.scene(0)


def test_staging_folder_separates_stores(make_store, new_scenes, tmp_path):
    first = Store(make_store(new_scenes(SHAPES, seed=1), "a"), str(tmp_path / "staged"))
    other = Store(make_store(new_scenes(SHAPES, seed=2), "b"), str(tmp_path / "staged"))
    assert (first.scene(0).codes != other.scene(0).codes).any()


def test_mixture_reads_staged_shards(gcs, make_store, tmp_path):
    local = make_store(SHAPES)
    remote = upload(local, gcs)

    def sentences(path, **options):
        config = MixtureConfig({"single": ComponentConfig(Single())}, (path,), 0.0, **options)
        return Mixture(config, 0).components[0].sentences(np.arange(40))

    np.testing.assert_array_equal(sentences(remote, stage_to=str(tmp_path / "staged")), sentences(local))


def test_inspect_checks_a_remote_store(gcs, tmp_path, manifest_header, new_scenes):
    path = f"{gcs}/written"
    writer.begin_store(path, manifest_header(), 2)
    for shard in range(2):
        assert writer.read_shard_entry(path, shard, 2) is None
        writer.write_shard(path, shard, 2, new_scenes(SHAPES, seed=shard)[:40], 16)
        assert writer.read_shard_entry(path, shard, 2) is not None
    assert writer.finish_store(path) == []
    for stage_to in ("", str(tmp_path / "staged")):  # in place by ranges, and copied
        assert list(find_problems(Store(path, stage_to))) == []
    size = epath.Path(f"{path}/shard-00001-of-00002.index").stat().length
    epath.Path(f"{path}/shard-00001-of-00002.index").unlink()
    assert writer.read_shard_entry(path, 1, 2) is None
    problems = list(find_problems(Store(path, str(tmp_path / "other"))))
    assert any(f"shard-00001-of-00002.index: is missing, the manifest says {size}" in problem for problem in problems)


def test_staging_waits_for_another_process_that_copies(make_store, tmp_path):
    store = pathlib.Path(make_store(SHAPES, num_shards=1))
    name, folder = "shard-00000-of-00001.index", epath.Path(tmp_path / "staged")
    folder.mkdir()
    with concurrent.futures.ThreadPoolExecutor() as pool, files.lock_file(folder / f".{name}.lock"):
        copy = pool.submit(staging.stage, epath.Path(store / name), {}, folder)
        with pytest.raises(TimeoutError):
            copy.result(0.2)
        (folder / name).write_bytes(b"checked")
    assert copy.result(10).read_bytes() == b"checked"
