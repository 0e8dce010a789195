"""Streaming of training images: one order on any number of processes and workers, and what bad data gives."""

import hashlib
import io
import tarfile

import numpy as np
import PIL.Image
import pytest

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.random_crop import RandomCrop
from lvm.data.images.sources import open_any_source
from tokenizer.images import ImagesConfig, TrainingImages

R, BATCH = 8, 8


def encode(pixels, kind):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tars(folder, num_tars, scenes, depth=True, damaged=()):
    """Tars of uneven numbers of scenes, whose pixels are their number."""
    folder.mkdir()
    for i in range(num_tars):
        with tarfile.open(folder / f"{i:03d}.tar", "w") as tar:
            for j in range(scenes + i % 3):
                level = (i * 7 + j) % 256
                rgb = encode(np.full((12, 16, 3), level, np.uint8), "PNG")
                members = {"png": b"damaged" if (i, j) in damaged else rgb}
                if depth:
                    members["depth.png"] = encode(np.full((12, 16), j + 1, np.uint16), "PNG")
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{j:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def open_images(folder, counts, workers=0, process=0, batch=BATCH, seed=5, **config):
    preprocess = Preprocess(R)
    source = open_any_source(str(folder), preprocess)
    config = {"heldout_fraction": 0.1, "source": str(folder), **config}
    return TrainingImages(source, ImagesConfig(**config), preprocess, batch, seed, counts, workers, process)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars") / "data"
    write_tars(folder, 34, 6)
    return folder


def digests(folder, counts, processes=1, workers=0, start=0, stop=24):
    """The hash of each batch, whose rows several processes read."""
    batches = [[] for _ in range(start, stop)]
    for process in range(processes):
        rows = np.arange(BATCH * process // processes, BATCH * (process + 1) // processes)
        with open_images(folder, counts, workers, process) as images:
            for step in range(start, stop):
                batches[step - start].append(images.read(step, rows)["images"])
    return [hashlib.sha256(np.concatenate(parts).tobytes()).hexdigest() for parts in batches]


@pytest.mark.parametrize(("stop", "resumed"), [(24, 7), pytest.param(200, 57, marks=pytest.mark.slow)])
def test_first_batches_have_one_hash_everywhere(tars, tmp_path, stop, resumed):
    expected = digests(tars, tmp_path / "a", stop=stop)
    assert len(set(expected)) == stop
    assert digests(tars, tmp_path / "b", processes=2, stop=stop) == expected
    assert digests(tars, tmp_path / "b", processes=4, stop=stop) == expected
    assert digests(tars, tmp_path / "c", workers=1, start=resumed, stop=stop) == expected[resumed:]  # without counts
    if stop == 200:
        assert digests(tars, tmp_path / "a", workers=2, start=resumed, stop=stop) == expected[resumed:]


def levels(folder, counts, steps, **config):
    with open_images(folder, counts, crop=None, **config) as images:
        batches = [images.read(step, np.arange(BATCH))["images"] for step in range(steps)]
    return np.concatenate(batches)[:, 0, 0, 0].tolist()


def test_every_image_comes_once_an_epoch(tmp_path):
    write_tars(tmp_path / "data", 5, 8, depth=False)  # 44 scenes
    config = {"heldout_fraction": 0.0, "rgb_share": 1.0, "mixed_files": 2}
    seen = levels(tmp_path / "data", tmp_path / "counts", 22, **config)
    expected = sorted((i * 7 + j) % 256 for i in range(5) for j in range(8 + i % 3))
    epochs = [seen[i : i + 44] for i in range(0, 176, 44)]
    assert [sorted(epoch) for epoch in epochs] == [expected] * 4
    assert len(set(map(tuple, epochs))) == 4
    assert len({level // 7 for level in epochs[0][:8]}) > 1


def test_unreadable_images_are_replaced_by_the_next(tmp_path, caplog):
    write_tars(tmp_path / "good", 3, 6, depth=False)
    write_tars(tmp_path / "bad", 3, 6, depth=False, damaged={(0, 2), (2, 1), (2, 2)})
    config = {"heldout_fraction": 0.0, "rgb_share": 1.0}
    good = levels(tmp_path / "good", tmp_path / "counts", 6, **config)
    caplog.set_level("INFO")
    bad = levels(tmp_path / "bad", tmp_path / "counts", 6, **config)
    damaged, expected = {2, 15, 16}, []
    for i in range(len(bad)):
        expected.append(next(level for level in good[i:] if level not in damaged) if i < 40 else bad[i])
    assert bad == expected
    assert sum("skipped 002.tar/0001" in record.message for record in caplog.records) == 1


def test_training_images_mix_streams_by_rgb_share(tars, tmp_path):
    with open_images(tars, tmp_path, rgb_share=0.25, crop=RandomCrop((0.5, 1.0))) as images:
        batch = images.read(3, np.arange(BATCH))["images"]
        heldout = images.heldout(4)
    assert (batch[2:, ..., 0] > 250).all()  # near
    assert (batch[:2, ..., 0] < 250).all()
    assert {stream: len(x) for stream, x in heldout.items()} == {"rgb": 3, "depth": 3}


def test_processes_open_only_the_files_of_their_rows(tars, tmp_path):
    with open_images(tars, tmp_path, heldout_fraction=0.0, mixed_files=2) as images:
        for step in range(3):
            images.read(step, np.arange(2))
        counted = (images._catalog._counts[:, 0] >= 0).sum()
    assert counted <= 4  # a lane's window, and the next one


def test_cache_holds_scenes_up_to_its_limit(tmp_path):
    source, kept = "tests/configs/tiny_scenes.py", tmp_path / "cache"
    scene_bytes = 4 * 4 * R * R * 3
    config = {"crop": None, "heldout_fraction": 0.25}
    with open_images(source, tmp_path, **config) as images:
        expected = [images.read(step, np.arange(BATCH))["images"] for step in range(20)]
    for workers, scenes in ((0, 10), (1, 100)):
        cache = {"cache_gigabytes": (scenes + 0.5) * scene_bytes / 1e9, "cache_folder": str(kept / str(workers))}
        with open_images(source, tmp_path, workers, **config, **cache) as images:
            cached = [images.read(step, np.arange(BATCH))["images"] for step in range(20)]
        assert np.array_equal(cached, expected)
        num_cached = len(list((kept / str(workers)).glob("*/??/*")))
        assert num_cached == 10 if scenes == 10 else 10 < num_cached <= 30


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rgb_share": 0.5}, "no image of a stream other than rgb; rgb_share=1"),
        ({"rgb_share": 1.0, "crop": RandomCrop(min_side=13)}, "16×12 is smaller than min_side=13"),
    ],
)
def test_source_that_runs_dry_is_one_clear_line(tmp_path, monkeypatch, config, message):
    monkeypatch.setattr("tokenizer.images._MAX_REPLACED", 8)
    write_tars(tmp_path / "data", 2, 3, depth=False)
    with open_images(tmp_path / "data", tmp_path / "counts", heldout_fraction=0.0, **config) as images:
        with pytest.raises(UserError, match=message) as error:
            images.read(0, np.arange(BATCH))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("batch", "share"), [(1, 0.5), (8, 0.99)])
def test_batch_too_small_for_both_kinds_is_an_error(tars, tmp_path, batch, share):
    with pytest.raises(UserError, match=rf"^config\.batch_size={batch} .* config\.data\.rgb_share={share}; use"):
        open_images(tars, tmp_path, batch=batch, rgb_share=share)


def test_unreadable_heldout_split_is_an_error(tmp_path):
    write_tars(tmp_path / "data", 1, 4, depth=False, damaged={(0, j) for j in range(4)})
    with (
        open_images(tmp_path / "data", tmp_path / "counts") as images,
        pytest.raises(UserError, match=r"no image of the held-out split could be read; the last, 000\.tar/"),
    ):
        images.heldout(4)


def test_cache_needs_whole_images():
    with pytest.raises(UserError, match="cache_gigabytes"):
        ImagesConfig(cache_gigabytes=1.0)
