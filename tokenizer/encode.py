"""Encodes a source into a store of codes.

    python -m tokenizer.encode --tokenizer=DIR --source=FOLDER-or-config --out=STORE

Each output shard holds a slice of the input's scenes. A shard that is there is not written again.
"""

from __future__ import annotations

import collections
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from etils import epath

from lvm import cli, files
from lvm.console import Progress, say
from lvm.data import split, store
from lvm.data.scenes import Scene
from lvm.data.sources import SceneImages, Source, open_source
from lvm.data.store import GroupedScene
from lvm.errors import UserError
from tokenizer.pretrained import Tokenizer

_VERSIONS = ("jax", "jaxlib", "pillow", "array_record")
_MAY_DIFFER = {"versions"}  # a store that was begun before an upgrade is finished after it
_AHEAD = 2  # device calls under way while the host prepares the next


class Encoder:
    """Turns slices of a source into shards.

    Args:
      tokenizer: the codes' meaning.
      source: the scenes.
      folder: the store.
      num_shards: how many shards the source is cut into.
      batch_size: images a device in each call; always full, the last one of a shard padded.
    """

    def __init__(self, tokenizer: Tokenizer, source: Source, folder: str, num_shards: int, batch_size: int):
        self._tokenizer, self._source, self._num_shards = tokenizer, source, num_shards
        self._folder, self._batch_size = epath.Path(folder), batch_size
        self._classes = {name: number for number, name in enumerate(source.classes)}
        self._stream_sets = {names: number for number, names in enumerate(source.stream_sets)}
        self._failures: list[dict[str, str]] = []

    def header(self) -> dict[str, Any]:
        """What the manifest says of the whole store."""
        return {
            "tokenizer": self._tokenizer.identity(),
            "dtype": self._tokenizer.config.compute_dtype,
            "device_kind": jax.devices()[0].device_kind,
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
            "batch_size": self._batch_size,
            "source": self._source.describe(),
            "skipped": [{"key": item.key, "reason": item.reason} for item in self._source.skipped],
            "streams": {name: codec.to_json() for name, codec in self._source.streams.items()},
            "stream_sets": [list(names) for names in self._source.stream_sets],
            "classes": list(self._source.classes),
            "group_hashes": self._group_hashes(),
        }

    def _group_hashes(self) -> list[int]:
        """The lowest and highest: what tells the split of all groups, those that can't be read among them."""
        hashes = [split.group_hash(self._source.info(i).group) for i in range(len(self._source))]
        return [min(hashes), max(hashes)]

    def run(self) -> None:
        """Writes the shards that are missing, then the manifest."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._check_same_store()
        progress = Progress(len(self._source), unit="scenes")
        for shard in range(self._num_shards):
            first, last = self._slice(shard)
            if store.read_entry(self._folder, shard, self._num_shards) is None:
                self._failures = []
                store.write_shard(
                    self._folder,
                    shard,
                    self._num_shards,
                    self._encode(first, last),
                    self._tokenizer.config.codebook_size,
                    self._failures,
                )
                for failure in self._failures:
                    say(f"skipped {failure['key']}: {failure['reason']}")
                say(f"shard {shard + 1}/{self._num_shards}: {progress.line(last)}")
        store.write_manifest(self._folder, self.header(), self._num_shards)

    def _slice(self, shard: int) -> tuple[int, int]:
        scenes, shards = len(self._source), self._num_shards
        return scenes * shard // shards, scenes * (shard + 1) // shards

    def _check_same_store(self) -> None:
        """A header stands beside the shards from the first one on: shards of two kinds never mix."""
        path, header = self._folder / "header.json", files.as_json(self.header())
        if path.exists():
            old = files.read_json(path)
            changed = sorted(key for key in header if key not in _MAY_DIFFER and old.get(key) != header[key])
            if changed or old["num_shards"] != self._num_shards:
                what = ", ".join(changed) or f"num_shards: {old['num_shards']} → {self._num_shards}"
                raise UserError(
                    f"{self._folder}: holds codes made otherwise (changed: {what}); choose another --out, "
                    "or what it was begun with"
                )
            return
        if any(not file.name.startswith(".") for file in self._folder.iterdir()):
            raise UserError(f"{self._folder}: not empty and not a store; choose a new folder for --out")
        files.write_json(path, {**header, "num_shards": self._num_shards})

    def _encode(self, first: int, last: int) -> Iterator[GroupedScene]:
        loaded: collections.deque[SceneImages] = collections.deque()
        encoded = self._codes(self._images(first, last, loaded))
        ready = np.zeros((0, self._tokenizer.codes_per_image), np.uint16)  # [images, N]
        for batch in encoded:
            ready = np.concatenate([ready, batch])
            while loaded and len(ready) >= (count := self._count(loaded[0])):
                scene, ready = self._scene(loaded.popleft(), ready[:count]), ready[count:]
                yield scene

    def _images(self, first: int, last: int, loaded: collections.deque[SceneImages]) -> Iterator[np.ndarray]:
        """All images of the scenes, one after the other; the scenes they belong to go into `loaded`."""
        numbers = grain.MapDataset.range(first, last).map(self._source.load)
        for scene in numbers.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)):
            self._failures += [{"key": item.key, "reason": item.reason} for item in scene.failures]
            if len(scene.images):
                loaded.append(scene)
                yield from scene.images.reshape(-1, *scene.images.shape[2:])

    def _codes(self, images: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Batches of codes uint16 [≤ batch_size · devices, N], some calls behind the images."""
        waiting: collections.deque[tuple[jax.Array, int]] = collections.deque()
        at_once = self._batch_size * self._tokenizer.num_devices
        for batch in _batched(images, at_once):
            padding = [(0, at_once - len(batch)), (0, 0), (0, 0), (0, 0)]
            waiting.append((self._tokenizer.encode_async(np.pad(batch, padding)), len(batch)))
            if len(waiting) > _AHEAD:
                codes, count = waiting.popleft()
                yield np.asarray(codes).astype(np.uint16)[:count]
        for codes, count in waiting:
            yield np.asarray(codes).astype(np.uint16)[:count]

    @staticmethod
    def _count(scene: SceneImages) -> int:
        return scene.images.shape[0] * scene.images.shape[1]

    def _scene(self, loaded: SceneImages, codes: np.ndarray) -> GroupedScene:
        info, (frames, streams) = loaded.info, loaded.images.shape[:2]
        class_id = self._classes.get(info.class_name, -1)
        grids = codes.reshape(frames, streams, -1)  # [T, S, N]
        return GroupedScene(Scene(info.key, class_id, self._stream_sets[info.streams], grids), info.group)


def _batched(images: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    batch: list[np.ndarray] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def main() -> None:
    """The command."""
    if _SHARDS.value < 1 or _BATCH_SIZE.value < 1:
        raise UserError("--num_shards and --batch_size must be at least 1")
    tokenizer = Tokenizer.load(_TOKENIZER.value)
    source = open_source(_SOURCE.value, tokenizer.preprocess)
    for skipped in source.skipped:
        say(f"skipped {skipped.key}: {skipped.reason}")
    Encoder(tokenizer, source, _OUT.value, min(_SHARDS.value, len(source)), _BATCH_SIZE.value).run()
    manifest = store.Store(_OUT.value).manifest
    images = sum(shard["images"] for shard in manifest["shards"])
    used = np.count_nonzero(np.sum([shard["histogram"] for shard in manifest["shards"]], axis=0))
    say(
        f"{_OUT.value}: {sum(shard['scenes'] for shard in manifest['shards'])} scenes, {images} images, "
        f"{used} of {tokenizer.config.codebook_size} codes used"
    )


if __name__ == "__main__":
    _TOKENIZER = flags.DEFINE_string("tokenizer", None, "a tokenizer's folder", required=True)
    _SOURCE = flags.DEFINE_string(
        "source", None, "a folder of images or a source's config file", required=True
    )
    _OUT = flags.DEFINE_string("out", None, "the store to write", required=True)
    _SHARDS = flags.DEFINE_integer("num_shards", 4, "how many files the store is cut into")
    _BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "images a device in each call")
    cli.run(main)
