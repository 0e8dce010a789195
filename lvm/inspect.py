"""Print the contents of a store and verify it against its manifest.

    lvm inspect STORE

Compares checksums, indexes and counts with the manifest. With `--source` and `--tokenizer`, re-encodes a
sample of scenes and compares the codes; with `--tokenizer` and `--sheet=FILE.png`, decodes it onto a contact sheet.
`--json` prints one JSON object. Exits with 1 if anything is damaged, naming shard, scene and frame.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from lvm.common import cli, errors, files, statistics
from lvm.common.commands import report_error
from lvm.common.errors import UserError
from lvm.data.images.augment import Augment
from lvm.data.images.decoding import SceneDecoder
from lvm.data.images.sources import ImageSource, open_source
from lvm.data.mixture.split import content_hash
from lvm.data.store import writer
from lvm.data.store.format import SECTIONS, Scene
from lvm.data.store.reader import HEADER, MANIFEST, Store
from lvm.data.store.shards import FILE_CHECKSUM_MISMATCH, Shard, check_size
from lvm.inference.contact_sheet import Cell, render_sheet
from tokenizer import Tokenizer

_MAX_IMAGES, _MAX_LABEL = 16, 16  # images per scene on a sheet, characters of its key
_CHUNK = 1024  # blocks read at once
_LONG = ("histogram", "shards", "skipped")  # fields of a manifest that no summary prints


def find_problems(store: Store) -> Iterator[str]:
    """Yields every problem of a store, one line each; damaged codes in the words of training's errors."""
    entries: list[dict[str, Any]] = []
    yield from _manifest_problems(store, entries)
    for shard, entry in enumerate(entries or store.manifest["shards"]):
        problems = list(_shard_problems(store, shard, entry))
        yield from problems
        yield from (p for p in _checksum_problems(store, shard, bool(problems)) if p not in problems)


def _manifest_problems(store: Store, entries: list[dict[str, Any]]) -> Iterator[str]:
    """Rebuilds the manifest from the header and the shards' entries, and compares; fills `entries`."""
    path = store.path / MANIFEST
    try:
        header = files.read_json(store.path / HEADER)
        read = [files.read_json(store.path / f"{shard['name']}.json") for shard in store.manifest["shards"]]
        num_shards = header.pop("num_shards")
        rebuilt = files.as_json(writer.build_manifest(header, read))
    except (OSError, UserError, KeyError, IndexError, TypeError, ValueError) as error:
        yield f"{store.path}: {HEADER} or a shard's entry is missing or damaged: {error}"
        return
    if num_shards != len(read):
        yield f"{path}: has {len(read)} shards, {HEADER} {num_shards}"
    for key in sorted(rebuilt.keys() | store.manifest.keys()):
        if rebuilt.get(key) != store.manifest.get(key):
            yield f"{path}: damaged: {key} differs from {HEADER} and the shards' entries"
    if rebuilt["shards"] == store.manifest["shards"]:
        entries += read


def _checksum_problems(store: Store, shard: int, is_named: bool) -> Iterator[str]:
    for name, expected in store.manifest["shards"][shard]["files"].items():
        path = store.path / name
        try:
            check_size(path, expected)
            if files.sha256(path) != expected["sha256"]:
                yield f"{path}: {FILE_CHECKSUM_MISMATCH}{'' if is_named else ', but every block is intact'}"
        except (UserError, OSError) as error:
            yield str(error)


def _shard_problems(store: Store, number: int, entry: Mapping[str, Any]) -> Iterator[str]:
    """Compares a shard's codes with its index, and its index with its entry."""
    shard, name = store.shards[number], store.path / entry["name"]
    try:
        sections = {section: shard.section(section) for section in SECTIONS}
        histogram, is_damaged = np.zeros(2**16, np.int64), False
        for damage in _damaged_blocks(shard, histogram):
            is_damaged = True
            yield damage
    except UserError as error:
        yield str(error)
        return
    scenes, num_streams = sections["scenes"], np.array([len(names) for names in store.stream_sets], np.int64)
    if scenes["stream_set"].max(initial=0) >= len(num_streams):
        yield f"{name}: the index has stream set {scenes['stream_set'].max()}, the manifest {len(num_streams)} sets"
        return
    images = scenes["frames"] * num_streams[scenes["stream_set"]]
    if (scenes["first_grid"] != np.cumsum(images) - images).any():
        yield f"{name}: the shard's index is damaged: its scenes do not follow one another"
    hashes = np.array([content_hash(shard.key(i).encode()) for i in range(len(scenes))], np.uint64)
    if duplicates := len(hashes) - len(np.unique(hashes)):
        yield f"{name}: {duplicates} duplicate keys"
    expected_histogram = histogram if is_damaged else entry.get("histogram", histogram)
    if not np.array_equal(np.trim_zeros(histogram, "b"), np.trim_zeros(expected_histogram, "b")):
        yield f"{name}: histogram differs from that of the codes"
    by_stream_set = np.bincount(scenes["stream_set"], images).astype(int).tolist()
    expected: dict[str, Any] = {
        "scenes": len(scenes),
        "images": int(images.sum()),
        "images_by_stream_set": {str(i): count for i, count in enumerate(by_stream_set) if count},
    }
    if len(scenes) and not entry["failures"]:  # groups of failures are in the entry only
        expected["group_hashes"] = [int(scenes["group"].min()), int(scenes["group"].max())]
    for key, value in expected.items():
        if entry.get(key, value) != value:
            yield f"{name}: the entry says {key} {entry[key]}, the shard has {value}"


def _damaged_blocks(shard: Shard, histogram: np.ndarray) -> Iterator[str]:
    """Yields the damage of each block; counts the codes of all in `histogram`."""
    for start in range(0, shard.num_blocks, _CHUNK):
        content = shard.read(start, min(start + _CHUNK, shard.num_blocks))
        histogram += np.bincount(np.frombuffer(content, "<u2"), minlength=len(histogram))
        yield from (str(shard.damage(block)) for block in shard.damaged_blocks(content, start))


def sample_scenes(store: Store, count: int) -> Iterator[tuple[int, Scene]]:
    """Yields evenly spaced scenes, each with its shard, without damaged ones (`find_problems` lists those)."""
    for i in np.unique(np.linspace(0, len(store) - 1, count).astype(int)).tolist() if len(store) else ():
        with contextlib.suppress(UserError):
            yield store.shard_of(i), store.scene(i)


def reencode(store: Store, source_spec: str, tokenizer: Tokenizer, count: int) -> list[str]:
    """Re-encodes a sample of scenes and returns the differences. Raises UserError for another source."""
    augment = Augment(store.manifest.get("augment", 0), tokenizer.preprocess)
    source = open_source(source_spec, augment.source_preprocess)
    if files.as_json(source.describe()) != store.manifest["source"]:
        raise UserError(f"--source: {source_spec} is not the source of {store.path}, or has changed")
    num_shards, problems = len(store.manifest["shards"]), []
    for shard, scene in sample_scenes(store, count):
        scenes = range(len(source) * shard // num_shards, len(source) * (shard + 1) // num_shards)
        images = _load_images(source, scenes, augment, scene.key)
        T, S, N = scene.codes.shape
        if images is None:
            problems.append(f"{store.path}: {scene.key}: not in the source")
        elif len(images) != T * S:
            problems.append(f"{store.path}: {scene.key}: {T * S} images, the source has {len(images)}")
        else:
            codes = tokenizer.encode(images, store.manifest["batch_size"]).reshape(T, S, N)
            if wrong := int(np.count_nonzero(codes != scene.codes)):
                problems.append(f"{store.path}: {scene.key}: re-encoded, {wrong} of {codes.size} codes differ")
    return problems


def _load_images(source: ImageSource, scenes: range, augment: Augment, key: str) -> UInt8[np.ndarray, "n R R 3"] | None:
    """Images of the scene with this key, or copy of a scene; None if `scenes` of the source don't have it."""
    original = key.rpartition("#")[0] if augment.copies else key
    i = next((i for i in scenes if source.info(i).key == original), None)
    if i is None:
        return None
    decoded = SceneDecoder(source, augment)(i)
    return next((images for scene, images in decoded if len(images) and scene.info.key == key), None)


def write_sheet(store: Store, tokenizer: Tokenizer, count: int, path: pathlib.Path) -> None:
    """Decodes the first images of a sample of scenes to a contact sheet, one row per scene."""
    rows = []
    for _, scene in sample_scenes(store, count):
        streams = store.stream_sets[scene.stream_set]
        images = tokenizer.decode(scene.codes.reshape(-1, store.codes_per_image)[:_MAX_IMAGES])
        labels = [scene.key[-_MAX_LABEL:], *(streams[i % len(streams)] for i in range(1, len(images)))]
        rows.append([Cell(image, label) for image, label in zip(images, labels, strict=True)])
    if not rows:
        raise UserError(f"{store.path}: has no readable scene")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render_sheet(rows)).save(path)


def summarize(store: Store) -> dict[str, Any]:
    """The manifest without its long fields, and statistics of it."""
    manifest = store.manifest
    histogram, shards = np.array(manifest["histogram"]), manifest["shards"]
    return {key: value for key, value in manifest.items() if key not in _LONG} | {
        "num_shards": len(shards),
        "bytes": sum(file["bytes"] for shard in shards for file in shard["files"].values()),
        "codes_used": int(np.count_nonzero(histogram)),
        "perplexity": float(statistics.perplexity(histogram)) if histogram.any() else 0.0,
        "failures": [failure for shard in shards for failure in shard["failures"]],
        "skipped": manifest.get("skipped", []),
    }


def format_summary(summary: dict[str, Any]) -> list[str]:
    """Formats `summarize` as lines."""
    tokenizer = summary["tokenizer"]
    height, width = tokenizer["grid"]
    streams = ", ".join(f"{name} {count:,}" for name, count in sorted(summary["images_by_stream"].items()))
    versions = ", ".join(f"{name} {' and '.join(values)}" for name, values in summary["versions"].items())
    codecs = ", ".join(f"{name} ({codec['kind']})" for name, codec in summary["streams"].items())
    skipped, failures = summary["skipped"], summary["failures"]
    return [
        f"version {summary['version']}, {summary['num_shards']} shards, {summary['bytes']:,} bytes",
        f"{summary['scenes']:,} scenes, {summary['images']:,} images: {streams or 'none'}",
        f"tokenizer {tokenizer['hash'][:12]}: grids of {height}×{width}, {summary['codes_used']:,} of "
        f"{tokenizer['num_codes']:,} codes used, perplexity {summary['perplexity']:.1f}",
        f"encoded in {summary.get('dtype', '?')} on {summary.get('device_kind', '?')} with "
        f"{versions or 'unknown versions'}",
        f"streams: {codecs}",
        f"{len(summary['classes'])} classes, {len(skipped)} items of the source skipped, {len(failures)} failures",
        *(f"  {item['key']}: {item['reason']}" for item in [*skipped, *failures]),
    ]


def _run(args: cli.Args) -> int:
    try:
        store = Store(args.store, args.stage_to)
    except (UserError, KeyError, TypeError, ValueError) as error:
        if not (epath.Path(args.store) / MANIFEST).exists():
            raise
        return report_error(str(error), errors.EXIT_ERROR)  # as for any other damage
    if (args.source or args.sheet) and not args.tokenizer:
        raise UserError("--source and --sheet need --tokenizer")
    if args.sheet and pathlib.Path(args.sheet).suffix.lower() != ".png":
        raise UserError(f"--sheet={args.sheet} must end in .png")
    summary, problems = summarize(store), []
    if not args.json:
        print("\n".join([str(store.path), *format_summary(summary)]))
    for problem in find_problems(store) if args.verify else ():
        problems.append(problem)
        if not args.json:
            print(problem)
    differences = []
    if args.tokenizer:
        tokenizer = Tokenizer.load(args.tokenizer, store.manifest.get("dtype"))
        if tokenizer.identity()["hash"] != store.manifest["tokenizer"]["hash"]:
            raise UserError(f"--tokenizer: {args.tokenizer} did not make the codes of {store.path}")
        if args.sheet:
            write_sheet(store, tokenizer, args.sample, pathlib.Path(args.sheet))
        differences = reencode(store, args.source, tokenizer, args.sample) if args.source else []
    problems += differences
    if args.json:
        report = {"store": str(store.path), **summary, "problems": problems}
        print(json.dumps(report, indent=1, sort_keys=True))
    elif problems:
        print("\n".join([*differences, f"{len(problems)} problem{'s' * (len(problems) > 1)}"]))
    else:
        verified = "all checksums and counts are right" if args.verify else "not verified"
        print(verified + (f"; {args.sample} scenes re-encoded" if args.source else ""))
    return errors.EXIT_ERROR if problems else errors.EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__, positionals=("store",))
    flags.string("store", None, "store folder; also as the first argument", required=True)
    flags.boolean("json", False, "print JSON")
    flags.boolean("verify", True, "verify all files; --noverify reads only the manifest")
    flags.string("source", "", "source of the store: re-encode a sample of scenes")
    flags.string("tokenizer", "", "tokenizer folder, for --source and --sheet")
    flags.integer("sample", 8, "number of scenes to re-encode and to decode", lower_bound=1)
    flags.string("sheet", "", "PNG file for a contact sheet of decoded scenes")
    flags.string("stage_to", "", "local folder to copy shards to before reading")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
