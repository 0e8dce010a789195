"""Print what a store holds and verify it against its manifest.

    lvm inspect STORE

Compares checksums, records, indexes and counts with the manifest. With `--source` and `--tokenizer`, some scenes are
encoded again and compared; with `--tokenizer` and `--sheet=FILE.png`, some are decoded onto a contact sheet. `--json`
prints one JSON object. Exits with 1 and names shard and record where anything is damaged.
"""

from __future__ import annotations

import collections
import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from lvm.common import cli, errors, files, statistics
from lvm.common.errors import UserError
from lvm.data.images.augment import Augment
from lvm.data.images.batches import ImageBatcher
from lvm.data.images.sources import ImageSource, open_source
from lvm.data.mixture.split import content_hash
from lvm.data.store import writer
from lvm.data.store.format import DamagedError, Scene
from lvm.data.store.reader import HEADER, MANIFEST, Store, index_mismatch
from lvm.data.store.records import FILE_CHECKSUM_MISMATCH, check_size
from lvm.inference.contact_sheet import Cell, render_sheet
from tokenizer import Tokenizer

_ACROSS, _LABEL = 16, 16  # images of a scene on a sheet, and characters of its key


def find_problems(store: Store) -> Iterator[str]:
    """All that is wrong with a store, a line each; where a record is at fault, in the words that training uses."""
    yield from _manifest_problems(store)
    counted = _Counts(store)
    for shard in range(len(store.shards)):
        found = list(counted.shard_problems(shard))
        yield from found
        named = shard in counted.damaged
        yield from (problem for problem in _checksum_problems(store, shard, named) if problem not in found)
    if not counted.damaged:
        yield from counted.total_problems()


def _manifest_problems(store: Store) -> Iterator[str]:
    """The manifest is made of the header and the entries, and can be again."""
    try:
        header = files.read_json(store.path / HEADER)
        entries = [
            files.read_json(store.path / f"{shard['name']}.json") for shard in store.manifest["shards"]
        ]
        if header.pop("num_shards") != len(entries):
            yield f"{store.path / MANIFEST}: has {len(entries)} shards, {HEADER} says another number"
        again = files.as_json(writer.build_manifest(header, entries))
    except (OSError, UserError, KeyError, IndexError, TypeError, ValueError) as error:
        yield f"{store.path}: {HEADER} or a shard's entry is missing or damaged: {error}"
        return
    for key in sorted(again.keys() | store.manifest.keys()):
        if again.get(key) != store.manifest.get(key):
            yield f"{store.path / MANIFEST}: damaged: {key} is not that of {HEADER} and the shards' entries"
    for shard, entry in enumerate(entries):
        with contextlib.suppress(UserError):  # an index that can't be read is listed with its shard
            groups = store.indexes[shard]["group"]
            # Groups that couldn't be read are in the entry alone, and come with failures.
            if len(groups) and not entry["failures"]:
                extremes = [int(groups.min()), int(groups.max())]
                if entry["group_hashes"] != extremes:
                    name = f"{entry['name']}.json"
                    yield f"{store.path / name}: damaged: group_hashes are not those of the index"


def _checksum_problems(store: Store, shard: int, named: bool) -> Iterator[str]:
    for name, listed in store.manifest["shards"][shard]["files"].items():
        file = store.path / name
        try:
            check_size(file, listed)
            if files.sha256(file) != listed["sha256"]:
                where = "" if named else "; each of its records is whole by itself"
                yield f"{file}: {FILE_CHECKSUM_MISMATCH}{where}"
        except (UserError, OSError) as error:
            yield str(error)


class _Counts:
    """What is counted while all records are read.

    Attributes:
      damaged: the shards that couldn't be counted to their end.
    """

    def __init__(self, store: Store):
        self._store = store
        self.damaged: list[int] = []
        self._histogram = np.zeros(2**16, np.int64)
        self._images: collections.Counter[str] = collections.Counter()

    def shard_problems(self, shard: int) -> Iterator[str]:
        """Reads a shard's records and compares them with its index and its entry."""
        store, entry = self._store, self._store.manifest["shards"][shard]
        try:
            store.shards.check_opens(shard)
            index = store.indexes[shard]
        except UserError as error:
            self.damaged.append(shard)
            yield str(error)
            return
        hashes, scenes, images, whole = [np.zeros(0, np.uint64)], 0, 0, True
        for record in range(entry["records"]):
            low, high = np.searchsorted(index["record"], [record, record + 1])
            try:
                page = store.shards.page(shard, record)
                _check_index(index[low:high], page, store.shards.record_name(shard, record))
            except DamagedError as error:
                whole = False
                yield str(error)
                continue
            scenes, images = scenes + len(page), images + self._count(page)
            hashes.append(np.array([content_hash(scene.key.encode()) for scene in page], np.uint64))
        if not whole:
            self.damaged.append(shard)
            return
        place = store.path / entry["name"]
        if (scenes, images) != (entry["scenes"], entry["images"]):
            wanted = f"{entry['scenes']} and {entry['images']}"
            yield f"{place}: holds {scenes} scenes and {images} images, the manifest says {wanted}"
        if repeated := scenes - len(np.unique(np.concatenate(hashes))):
            yield f"{place}: {repeated} keys are there twice"

    def _count(self, page: list[Scene]) -> int:
        """Counts the codes and images of a page; returns how many images."""
        self._histogram += np.bincount(
            np.concatenate([scene.codes.ravel() for scene in page]), minlength=2**16
        )
        frames = sum(len(scene.codes) for scene in page)
        names = self._store.stream_sets[page[0].stream_set]
        self._images.update(dict.fromkeys(names, frames))
        return frames * len(names)

    def total_problems(self) -> Iterator[str]:
        """Compares what was counted with the manifest."""
        manifest, place = self._store.manifest, self._store.path / MANIFEST
        if dict(self._images) != manifest["images_by_stream"]:
            yield f"{place}: {dict(self._images)} images are there, it says {manifest['images_by_stream']}"
        if not np.array_equal(np.trim_zeros(self._histogram, "b"), np.trim_zeros(manifest["histogram"], "b")):
            yield f"{place}: the histogram is not that of the codes"


def _check_index(rows: np.ndarray, page: list[Scene], where: str) -> None:
    """Raises DamagedError where a record's entries of the index tell of other scenes."""
    fields = ["slot", "frames", "stream_set", "class_id"]
    found = [tuple(row) for row in rows[fields].tolist()]
    if found != [(slot, len(s.codes), s.stream_set, s.class_id) for slot, s in enumerate(page)]:
        raise index_mismatch(where)


def sample_scenes(store: Store, count: int) -> Iterator[tuple[int, Scene]]:
    """Scenes spread over the store, with their shard; damaged ones are left out."""
    for number in np.unique(np.linspace(0, len(store) - 1, count).astype(int)).tolist() if len(store) else ():
        try:
            yield store.shard_of(number), store.scene(number)
        except UserError:
            continue  # listed by `find_problems`


def reencode(store: Store, source_spec: str, tokenizer: Tokenizer, count: int) -> list[str]:
    """Encodes some scenes again; the problems found. Raises UserError for another source than the store's."""
    augment = Augment(store.manifest.get("augment", 0), tokenizer.preprocess)
    source = open_source(source_spec, augment.source_preprocess)
    if files.as_json(source.describe()) != store.manifest["source"]:
        raise UserError(f"--source: {source_spec} is not the source of {store.path}, or not as it was")
    shards, found = len(store.manifest["shards"]), []
    for shard, scene in sample_scenes(store, count):
        slices = range(len(source) * shard // shards, len(source) * (shard + 1) // shards)
        images = _images(source, slices, augment, scene.key)
        if images is None:
            found.append(f"{store.path}: {scene.key}: not in the source")
            continue
        frames, streams, _ = scene.codes.shape
        if len(images) != frames * streams:
            found.append(
                f"{store.path}: {scene.key}: {len(images)} images are read of it, {frames * streams} are stored"
            )
            continue
        codes = tokenizer.encode(images, store.manifest["batch_size"]).reshape(scene.codes.shape)
        if wrong := int(np.count_nonzero(codes != scene.codes)):
            found.append(f"{store.path}: {scene.key}: encoded again, {wrong} of {codes.size} codes differ")
    return found


def _images(source: ImageSource, slices: range, augment: Augment, key: str) -> np.ndarray | None:
    """The images uint8 [n, R, R, 3] of the scene of this key, which is one of a slice of the source."""
    original = key.rpartition("#")[0] if augment.copies else key
    index = next((i for i in slices if source.info(i).key == original), None)
    if index is None:
        return None
    chunk, before = ImageBatcher(source, [(index, index + 1)], augment)(0), 0
    for read in chunk["scenes"]:
        if read.num_images and read.info.key == key:
            return chunk["images"][before : before + read.num_images]
        before += read.num_images
    return None


def write_sheet(store: Store, tokenizer: Tokenizer, count: int, file: pathlib.Path) -> None:
    """Decodes the beginnings of some scenes onto a picture, a row each."""
    rows = []
    for _, scene in sample_scenes(store, count):
        streams = store.stream_sets[scene.stream_set]
        images = tokenizer.decode(scene.codes.reshape(-1, store.codes_per_image)[:_ACROSS])
        labels = [scene.key[-_LABEL:], *(streams[place % len(streams)] for place in range(1, len(images)))]
        rows.append([Cell(image, label) for image, label in zip(images, labels, strict=True)])
    if not rows:
        raise UserError(f"{store.path}: no scene of it can be read and decoded")
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render_sheet(rows)).save(file)


def summarize(store: Store) -> dict[str, Any]:
    """The manifest without what is long, and figures made of it."""
    manifest = store.manifest
    histogram = np.array(manifest["histogram"])
    shards = manifest["shards"]
    stored = sum(file["bytes"] for shard in shards for file in shard["files"].values())
    long = ("histogram", "shards", "skipped")
    return {key: value for key, value in manifest.items() if key not in long} | {
        "num_shards": len(shards),
        "bytes": stored,
        "codes_used": int(np.count_nonzero(histogram)),
        "perplexity": float(statistics.perplexity(histogram)) if histogram.any() else 0.0,
        "failures": [failure for shard in shards for failure in shard["failures"]],
        "skipped": manifest.get("skipped", []),
    }


def format_summary(found: dict[str, Any]) -> list[str]:
    """`summarize` as lines."""
    tokenizer = found["tokenizer"]
    height, width = tokenizer["grid"]
    streams = ", ".join(f"{name} {count:,}" for name, count in sorted(found["images_by_stream"].items()))
    versions = ", ".join(f"{name} {' and '.join(all_of)}" for name, all_of in found["versions"].items())
    codecs = ", ".join(f"{name} ({codec['kind']})" for name, codec in found["streams"].items())
    lines = [
        f"version {found['version']}, {found['num_shards']} shards, {found['bytes']:,} bytes",
        f"{found['scenes']:,} scenes, {found['images']:,} images: {streams or 'none'}",
        f"tokenizer {tokenizer['hash'][:12]}: grids of {height}×{width}, {found['codes_used']:,} of "
        f"{tokenizer['num_codes']:,} codes used, perplexity {found['perplexity']:.1f}",
        f"made in {found.get('dtype', '?')} on {found.get('device_kind', '?')} with {versions or 'unknown versions'}",
        f"streams: {codecs}",
        f"{len(found['classes'])} classes, {len(found['skipped'])} items of the source skipped, "
        f"{len(found['failures'])} failures",
    ]
    return lines + [f"  {item['key']}: {item['reason']}" for item in [*found["skipped"], *found["failures"]]]


def _run(args: cli.Args) -> None:
    store = _open(args.store, args.stage_to)
    if bool(args.source) > bool(args.tokenizer) or bool(args.sheet) > bool(args.tokenizer):
        raise UserError("--source and --sheet need --tokenizer, which encodes and decodes")
    if args.sheet and pathlib.Path(args.sheet).suffix.lower() != ".png":
        raise UserError(f"--sheet: {args.sheet} is not a name of a picture; wanted one that ends in .png")
    if args.sample < 1:
        raise UserError(f"--sample: {args.sample} is not positive")
    found = summarize(store)
    if not args.json:
        print("\n".join([str(store.path), *format_summary(found)]))
    wrong = []
    for problem in find_problems(store) if args.verify else ():
        wrong.append(problem)
        if not args.json:
            print(problem)
    again = _with_tokenizer(store, args) if args.tokenizer else []
    if args.json:
        print(
            json.dumps(
                {"store": str(store.path), **found, "problems": wrong + again}, indent=1, sort_keys=True
            )
        )
    else:
        done = "all checksums, records and counts are right" if args.verify else "not verified"
        encoded = f"; {args.sample} scenes encoded again" if args.source else ""
        for problem in again:
            print(problem)
        bad = len(wrong) + len(again)
        print(f"{bad} problem{'s' * (bad > 1)}" if bad else done + encoded)
    if wrong or again:
        sys.exit(errors.EXIT_ERROR)


def _open(path: str, stage_to: str) -> Store:
    """The store; ends the command with exit code 1 where its manifest is there and can't be read."""
    try:
        return Store(path, stage_to)
    except (UserError, KeyError, TypeError, ValueError) as error:
        if not (epath.Path(path) / MANIFEST).exists():
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(errors.EXIT_ERROR)


def _with_tokenizer(store: Store, args: cli.Args) -> list[str]:
    tokenizer = Tokenizer.load(args.tokenizer, store.manifest.get("dtype"))
    if tokenizer.identity()["hash"] != store.manifest["tokenizer"]["hash"]:
        raise UserError(f"--tokenizer: {args.tokenizer} is not what made the codes of {store.path}")
    if args.sheet:
        write_sheet(store, tokenizer, args.sample, pathlib.Path(args.sheet))
    return reencode(store, args.source, tokenizer, args.sample) if args.source else []


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__, positionals=("store",))
    flags.string("store", None, "the store; the first argument", required=True)
    flags.boolean("json", False, "print JSON")
    flags.boolean("verify", True, "read all of the store; --noverify reads its manifest alone")
    flags.string("source", "", "what was encoded: some scenes are encoded again")
    flags.string("tokenizer", "", "the tokenizer's folder, for --source and --sheet")
    flags.integer("sample", 8, "how many scenes are encoded again, and drawn")
    flags.string("sheet", "", "a PNG file for decoded scenes")
    flags.string("stage_to", "", "a local folder that shards are copied to first")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
