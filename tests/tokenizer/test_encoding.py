"""Encoding a source into a store: completeness, and equal bytes for any division of the work."""

import dataclasses
import fcntl
import os
import pathlib

import numpy as np
import pytest
from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.images.augment import Augment
from lvm.data.images.decode_worker import Limits
from lvm.data.images.decoding import SceneDecoder
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import ImageSource
from lvm.data.images.sources.scene import Failure, SceneImages, SceneInfo
from lvm.data.mixture import split
from lvm.data.store import failures
from lvm.data.store.reader import Store
from lvm.data.streams.codecs import Image, Palette
from tests.tokenizer.networks import random_weights, small
from tokenizer import Tokenizer, encoding_progress
from tokenizer.encode import finish, parse_shard_flag
from tokenizer.encoding import Encoder
from tokenizer.encoding_progress import EncodingProgress

SIDE = 16
SETS = (("rgb",), ("rgb", "segmentation"))
# frames, stream set, unreadable frames
SCENES = [(1, 0, 0)] * 9 + [
    (3, 1, 0),
    (2, 0, 1),
    (1, 0, 1),
    (5, 1, 0),
    (1, 0, 0),
    (2, 1, 2),
    (1, 1, 0),
    (4, 0, 0),
]


@dataclasses.dataclass
class Scenes(ImageSource):
    """A source of random images, some of them unreadable."""

    resolution: int = SIDE
    scenes: tuple = tuple(SCENES)

    name = "random"
    streams = {"rgb": Image(), "segmentation": Palette(("nothing", "thing"), background=0)}  # noqa: RUF012
    stream_sets = SETS
    classes = ("cat", "dog")
    skipped = (Failure("notes.txt", "not a picture"),)

    def __len__(self):
        return len(self.scenes)

    def info(self, index):
        frames, stream_set, _ = self.scenes[index]
        return SceneInfo(f"scene {index}", f"group {index // 2}", ("", "cat")[index % 2], frames, SETS[stream_set])

    def load(self, index):
        info, bad = self.info(index), self.scenes[index][2]
        rng = np.random.default_rng([index, self.resolution])
        shape = (info.num_frames - bad, len(info.streams), self.resolution, self.resolution, 3)
        failures = tuple(Failure(info.key, f"frame {i}: truncated") for i in range(bad))
        info = dataclasses.replace(info, num_frames=shape[0])
        return SceneImages(info, rng.integers(0, 256, shape, dtype=np.uint8), failures)

    def describe(self):
        return {"kind": "random", "scenes": [list(scene) for scene in self.scenes]}


@pytest.fixture(scope="module")
def tokenizer():
    weights = random_weights(small("maskgit", resolution=SIDE, channel_multipliers=(1, 2), codebook_size=64))
    return Tokenizer(weights.config, weights.preprocess, weights.params)


def encode(tokenizer, folder, shares=((0, 1),), num_shards=4, batch_size=2, copies=0, source=None, workers=0):
    augment = Augment(copies, tokenizer.preprocess)
    source = source or Scenes(augment.source_preprocess.resolution)
    for share in shares:
        Encoder(tokenizer, source, folder, num_shards, batch_size, augment, workers, Limits()).run(*share)
        finish(str(folder))
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


@pytest.fixture(scope="module")
def reference(tokenizer, tmp_path_factory):
    return encode(tokenizer, tmp_path_factory.mktemp("stores") / "reference")


def test_store_has_every_scene_or_lists_its_failure(tokenizer, reference):
    store, source = Store(reference), Scenes()
    stored = {scene.key: scene for scene in map(store.scene, range(len(store)))}
    assert len(stored) == len(store) == 15
    for index in range(len(source)):
        loaded = source.load(index)
        if not len(loaded.images):
            assert loaded.info.key not in stored
            continue
        scene = stored[loaded.info.key]
        images = loaded.images.reshape(-1, SIDE, SIDE, 3)
        np.testing.assert_array_equal(scene.codes.reshape(len(images), -1), tokenizer.encode(images))
        assert scene.streams == loaded.info.streams
        assert scene.class_name == loaded.info.class_name
    assert store.manifest["failures"] == {"frame #: truncated": 4}
    listed = [("scene 10", "frame 0: truncated"), ("scene 11", "frame 0: truncated")]
    listed += [("scene 14", f"frame {i}: truncated") for i in range(2)]
    assert [(failure["key"], failure["reason"]) for failure in failures.read(reference)] == listed


def test_manifest_records_how_codes_were_computed(tokenizer, reference):
    manifest = Store(reference).manifest
    assert manifest["tokenizer"] == files.as_json(tokenizer.identity())
    assert (manifest["dtype"], manifest["device_kind"], manifest["batch_size"]) == ("float32", "cpu", 2)
    assert {"lvm", "jax", "jaxlib", "pillow", "libjpeg_turbo"} <= manifest["versions"].keys()
    assert all(len(versions) == 1 for versions in manifest["versions"].values())
    assert manifest["skipped"] == [{"key": "notes.txt", "reason": "not a picture"}]
    assert manifest["images_by_stream"] == {"rgb": 10 + 3 + 1 + 5 + 1 + 4, "segmentation": 3 + 5 + 1}
    groups = [split.group_hash(f"group {i}") for i in range(9)]  # unreadable ones included
    assert manifest["group_hashes"] == [min(groups), max(groups)]


@pytest.mark.parametrize(
    "shares", [[(1, 2), (0, 2)], [(3, 4), (1, 4), (0, 4), (2, 4)], [(0, 9), *((i, 9) for i in range(1, 9))]]
)
def test_any_number_of_processes_writes_equal_bytes(tokenizer, reference, tmp_path, shares):
    assert contents(encode(tokenizer, tmp_path / "store", shares)) == contents(reference)


def test_worker_processes_write_equal_bytes(tokenizer, reference, tmp_path):
    assert contents(encode(tokenizer, tmp_path / "store", workers=2)) == contents(reference)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_shards_do_not_depend_on_the_batch_size(tokenizer, reference, tmp_path, batch_size):
    files_written = contents(encode(tokenizer, tmp_path / "store", batch_size=batch_size))
    expected = {name: data for name, data in contents(reference).items() if name.startswith("shard-")}
    assert {name: files_written[name] for name in expected} == expected


def test_every_batch_has_one_shape_and_one_shard(tokenizer, tmp_path, monkeypatch):
    shapes, counts = [], []
    encode_async = tokenizer.encode_async

    def recorded(images):
        shapes.append(images.shape)
        counts.append(int(images.any((1, 2, 3)).sum()))
        return encode_async(images)

    monkeypatch.setattr(tokenizer, "encode_async", recorded)
    store = Store(encode(tokenizer, tmp_path / "store", num_shards=3))
    assert set(shapes) == {(16, SIDE, SIDE, 3)}  # eight devices of two
    per_shard = [shard.entry["images"] for shard in store.shards]
    assert counts == [n for images in per_shard for n in [16] * (images // 16) + [images % 16] * (images % 16 > 0)]


def test_existing_shards_are_not_encoded_again(tokenizer, reference, tmp_path, monkeypatch):
    folder = encode(tokenizer, tmp_path / "store")
    (folder / "shard-00002-of-00004.json").unlink()
    (folder / "manifest.json").unlink()
    calls, run = [], SceneDecoder.__call__
    monkeypatch.setattr(SceneDecoder, "__call__", lambda self, index: calls.append(index) or run(self, index))
    assert contents(encode(tokenizer, folder)) == contents(reference)
    missing = list(range(len(SCENES) * 2 // 4, len(SCENES) * 3 // 4))
    assert sorted(calls) == missing
    encode(tokenizer, folder)
    assert sorted(calls) == missing


def test_finish_removes_leftovers_of_killed_processes(tokenizer, reference, tmp_path):
    folder = encode(tokenizer, tmp_path / "store")
    for name in (".manifest.index.999999999.tmp", ".shard-00002-of-00004.json.999999999.tmp"):
        (folder / name).touch()
        os.utime(folder / name, (0, 0))
    assert contents(encode(tokenizer, folder)) == contents(reference)


def test_changed_settings_are_rejected(tokenizer, tmp_path):
    folder = encode(tokenizer, tmp_path / "store")
    with pytest.raises(UserError, match=r"\(changed: batch_size: 2 → 3, num_shards: 4 → 5\)"):
        encode(tokenizer, folder, num_shards=5, batch_size=3)
    with pytest.raises(UserError, match=r"changed: source"):
        encode(tokenizer, folder, source=Scenes(scenes=tuple(SCENES[:-1])))
    other = Tokenizer(tokenizer.config, Preprocess(SIDE, "center_crop"), tokenizer.params)
    with pytest.raises(
        UserError, match=r"changed: tokenizer\.codes, tokenizer\.hash, tokenizer\.preprocess\.mode: squash → center_"
    ):
        encode(other, folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="not empty and not a store"):
        encode(tokenizer, tmp_path / "other")


def test_shard_of_unreadable_scenes_is_empty(tokenizer, tmp_path):
    source = Scenes(scenes=((1, 0, 1), (2, 1, 2), (1, 0, 0), (1, 0, 0)))
    folder = encode(tokenizer, tmp_path / "store", num_shards=2, source=source)
    assert [shard.entry["scenes"] for shard in Store(folder).shards] == [0, 2]
    assert len(list(failures.read(folder))) == 3


def test_shard_without_scenes_is_written(tokenizer, tmp_path):
    source = Scenes(scenes=((1, 0, 0), (1, 0, 0)))
    folder = encode(tokenizer, tmp_path / "store", num_shards=5, source=source)
    assert [shard.entry["scenes"] for shard in Store(folder).shards] == [0, 0, 1, 0, 1]


def test_augmented_copies_share_the_group(tokenizer, reference, tmp_path):
    store = Store(encode(tokenizer, tmp_path / "store", copies=3))
    assert store.manifest["augment"] == 3
    index = store.index
    keys = {store.scene(i).key: index["group"][i] for i in range(len(store))}
    readable = [i for i, (frames, _, bad) in enumerate(SCENES) if frames > bad]
    expected = {f"scene {i}#{k}": split.group_hash(f"group {i // 2}") for i in readable for k in range(3)}
    assert keys == expected
    assert store.manifest["group_hashes"] == Store(reference).manifest["group_hashes"]
    assert len(list(failures.read(store.path))) == 4  # once per scene, not per copy
    other = encode(tokenizer, tmp_path / "other", [(1, 2), (0, 2)], copies=3)
    assert contents(other) == contents(store.path)


def test_augment_crops_all_images_of_a_copy_alike():
    side, R = 18, 16
    preprocess = dataclasses.replace(random_weights(small("maskgit", resolution=R)).preprocess)
    augment = Augment(16, preprocess)
    assert augment.source_preprocess.resolution == side
    pixels = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1)  # [side, side, 2]
    image = np.concatenate([pixels, np.zeros((side, side, 1), int)], -1).astype(np.uint8)
    scene = SceneImages(SceneInfo("a", "a", "", 3, SETS[1]), np.tile(image, (3, 2, 1, 1, 1)))
    crops = set()
    for i, copy in enumerate(augment(scene, Scenes.streams)):
        assert copy.info.key == f"a#{i}"
        assert (copy.images == copy.images[0, 0]).all()
        top, left, right = copy.images[0, 0, 0, 0, 0], copy.images[0, 0, 0, 0, 1], copy.images[0, 0, 0, -1, 1]
        expected = image[top : top + R, min(left, right) : min(left, right) + R]
        np.testing.assert_array_equal(copy.images[0, 0], expected if left < right else expected[:, ::-1])
        crops.add((int(top), int(min(left, right)), bool(left < right)))
    assert len(crops) > 8
    assert {flipped for *_, flipped in crops} == {True, False}
    with pytest.raises(UserError, match="--augment=-1 must"):
        Augment(-1, preprocess)


def test_scene_without_frames_is_a_failure(tokenizer, tmp_path):
    source = Scenes(scenes=((1, 0, 0), (0, 0, 0)))
    folder = encode(tokenizer, tmp_path / "store", num_shards=1, source=source)
    assert list(failures.read(folder)) == [{"key": "scene 1", "reason": "it has no frames"}]


def test_chunks_bound_images_of_late_videos():
    source = Scenes(scenes=((1, 0, 0),) * 60 + ((32, 1, 0),) * 60)
    chunks = list(SceneDecoder(source, Augment(0, Preprocess(SIDE))).chunks(range(3, 120)))
    assert [i for chunk in chunks for i in chunk] == list(range(3, 120))
    assert max(sum(source.info(i).num_frames * len(source.info(i).streams) for i in chunk) for chunk in chunks) == 64


def test_shard_of_another_process_is_rejected(tokenizer, tmp_path):
    folder = encode(tokenizer, tmp_path / "store", [(1, 2)])
    with open(folder / ".shard-00000-of-00004.codes.tmp", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing this shard"):
            encode(tokenizer, folder)
    encode(tokenizer, folder)


def test_finish_names_missing_shards(tokenizer, tmp_path, caplog):
    folder = encode(tokenizer, tmp_path / "store", [(1, 2)])
    assert "2 shards are missing (shard-00000-of-00004, shard-00001-of-00004)" in caplog.text
    with pytest.raises(UserError, match=r"not a finished store"):
        Store(folder)
    with pytest.raises(UserError, match=r"header\.json is missing"):
        finish(str(tmp_path))


def test_parse_shard_flag():
    assert parse_shard_flag("0/1") == (0, 1)
    assert parse_shard_flag("7/8") == (7, 8)
    for spec in ("8/8", "1", "-1/2", "a/b", "0/0"):
        with pytest.raises(UserError, match=f"--shard={spec} "):
            parse_shard_flag(spec)


def test_encoding_progress_reports_rates_and_waits(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(encoding_progress.time, "monotonic", lambda: clock[0])

    def after(seconds, items):
        for item in items:
            clock[0] += seconds
            yield item

    progress = EncodingProgress()
    progress.expect(2)
    progress.add_part(20)
    assert list(progress.timed("host", after(3.0, [1, 2]))) == [1, 2]
    with progress.waiting("device"):
        clock[0] += 1.0
    clock[0] += 1.0
    progress.add(images=80, scenes=10)
    assert progress.line() == (
        "10/40 scenes, 1.25 scenes/s, 24s left, 10 images/s, host-bound: waited 75% of the time for images, "
        "12% for codes"
    )
    clock[0] += 4.0
    with progress.waiting("device"):
        clock[0] += 4.0
    progress.add(images=8, scenes=5)
    assert progress.line().startswith("15/40 scenes, 0.625 scenes/s, 40s left, 1 images/s, device-bound")


def test_remote_store_has_equal_bytes(tokenizer, reference, gcs, tmp_path):
    for order in ([0], [1, 0]):
        folder = epath.Path(f"{gcs}/store-{len(order)}")
        encode(tokenizer, folder, [(process, len(order)) for process in order])
        encode(tokenizer, folder)  # nothing is left to do
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents(reference)
