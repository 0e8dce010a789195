"""Print the contents of a store and verify it against its manifest.

    lvm inspect STORE
    lvm inspect STORE --share=0.01             a quick look: one shard of a hundred
    lvm inspect STORE --shard=3/8              the share of the fourth of eight hosts

Compares checksums, indexes and counts with the manifest. With `--source` and `--tokenizer`, re-encodes a
sample of scenes and compares the codes; with `--tokenizer` and `--sheet=FILE.png`, decodes it onto a contact sheet.
`--json` prints one JSON object. Exits with 1 if anything is damaged, naming shard, scene and frame.
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from lvm.common import cli, errors, files, statistics
from lvm.common.commands import report_error
from lvm.common.errors import UserError
from lvm.common.logging import Progress, log_info
from lvm.data.images.augment import Augment
from lvm.data.images.decoding import SceneDecoder
from lvm.data.images.sources import ImageSource, open_any_source
from lvm.data.images.sources.division import PartSpec
from lvm.data.store import failures, verify
from lvm.data.store.format import Scene
from lvm.data.store.manifest import MANIFEST, same_codes
from lvm.data.store.reader import Store
from lvm.inference.contact_sheet import Cell, render_sheet
from tokenizer import Tokenizer
from tokenizer.encode import parse_shard_flag

_MAX_IMAGES, _MAX_LABEL = 16, 16  # images per scene on a sheet, characters of its key
_TABLES = ("sections", "files")  # places of the manifest's tables, which no summary prints
_MIN_IMAGES = 5_000_000  # to verify that are worth starting worker processes for, about ten seconds of one
_LOG_EVERY_S = 10.0


def sample_scenes(store: Store, count: int) -> Iterator[tuple[int, Scene]]:
    """Yields evenly spaced scenes, each with its shard, without damaged ones (`lvm.data.store.verify` lists those)."""
    for i in np.unique(np.linspace(0, len(store) - 1, count).astype(int)).tolist() if len(store) else ():
        with contextlib.suppress(UserError):
            yield store.shard_of(i), store.scene(i)


def reencode(store: Store, source_spec: str, tokenizer: Tokenizer, count: int) -> list[str]:
    """Re-encodes a sample of scenes and returns the differences. Raises UserError for another source."""
    augment = Augment(store.manifest.get("augment", 0), tokenizer.preprocess)
    source = open_any_source(source_spec, augment.source_preprocess)
    if not isinstance(source, ImageSource):
        raise UserError(f"--source: {source_spec} holds ready codes, not images")
    if files.as_json(source.describe()) != store.manifest["source"]:
        raise UserError(f"--source: {source_spec} is not the source of {store.path}, or has changed")
    num_shards, problems = len(store.shards), []
    for shard, scene in sample_scenes(store, count):
        images = _load_images(source, source.plan(shard, num_shards), augment, scene.key)
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


def _load_images(
    source: ImageSource, parts: Iterable[PartSpec], augment: Augment, key: str
) -> UInt8[np.ndarray, "n R R 3"] | None:
    """Images of the scene with this key, or copy of a scene; None if these parts of the source don't have it."""
    original = key.rpartition("#")[0] if augment.copies else key
    for part in map(source.part, parts):
        for scene in [scene for scene in part.scenes if source.info(scene).key == original]:
            decoded = SceneDecoder(source, augment)(scene)
            part.release()
            return next((images for copy, images in decoded if len(images) and copy.info.key == key), None)
        part.release()
    return None


def write_sheet(store: Store, tokenizer: Tokenizer, count: int, path: pathlib.Path) -> None:
    """Decodes the first images of a sample of scenes to a contact sheet, one row per scene."""
    rows = []
    for _, scene in sample_scenes(store, count):
        streams = scene.streams
        images = tokenizer.decode(scene.codes.reshape(-1, store.codes_per_image)[:_MAX_IMAGES])
        labels = [scene.key[-_MAX_LABEL:], *(streams[i % len(streams)] for i in range(1, len(images)))]
        rows.append([Cell(image, label) for image, label in zip(images, labels, strict=True)])
    if not rows:
        raise UserError(f"{store.path}: has no readable scene")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render_sheet(rows)).save(path)


def summarize(store: Store) -> dict[str, Any]:
    """The manifest without its tables' places, and the size of all shards."""
    sizes = (file["bytes"] for shard in store.shards for file in shard.entry["files"].values())
    return {key: value for key, value in store.manifest.items() if key not in _TABLES} | {"bytes": sum(sizes)}


def format_summary(store: Store) -> list[str]:
    """Formats `summarize` as lines."""
    summary = summarize(store)
    tokenizer, skipped = summary["tokenizer"], summary.get("skipped", [])
    height, width = tokenizer["grid"]
    streams = ", ".join(f"{name} {count:,}" for name, count in sorted(summary["images_by_stream"].items()))
    versions = ", ".join(f"{name} {' and '.join(values)}" for name, values in summary["versions"].items())
    codecs = ", ".join(f"{name} ({codec['kind']})" for name, codec in summary["streams"].items())
    return [
        f"version {summary['version']}, {summary['num_shards']} shards, {summary['bytes']:,} bytes",
        f"{summary['scenes']:,} scenes, {summary['images']:,} images: {streams or 'none'}",
        f"tokenizer {tokenizer['hash'][:12]}: grids of {height}×{width}, {summary['codes_used']:,} of "
        f"{tokenizer['num_codes']:,} codes used",
        f"encoded in {summary.get('dtype', '?')} on {summary.get('device_kind', '?')} with "
        f"{versions or 'unknown versions'}",
        f"streams: {codecs}",
        f"{len(summary['classes'])} classes, {len(skipped)} items of the source skipped",
        *(f"  {item['key']}: {item['reason']}" for item in skipped),
        *failures.describe(store.path, summary["failures"]),
    ]


def _verify(store: Store, args: cli.Args) -> tuple[list[str], str]:
    """Verifies this process's share of the store and prints each problem; returns them, and a line of what was done."""
    if not 0 < args.share <= 1:
        raise UserError(f"--share={args.share} must be in (0, 1], for example 0.01")
    process, num_processes = parse_shard_flag(args.shard) if args.shard else (0, 1)
    count = max(1, round(args.share * len(store.shards)))
    shards = np.unique(np.linspace(0, len(store.shards) - 1, count).astype(int))[process::num_processes].tolist()
    workers = args.workers
    if workers is None:
        is_large = store.manifest["images"] * len(shards) >= _MIN_IMAGES * len(store.shards)
        workers = min(os.cpu_count() or 1, len(shards)) if is_large else 0
    problems: list[str] = []

    def report(found: Iterable[str]) -> None:
        for problem in found:
            problems.append(problem)
            if not args.json:
                print(problem, flush=True)

    if process == 0:
        report(verify.manifest_problems(store))
    histogram, progress, logged = np.zeros(2**16, np.int64), Progress(len(shards), unit="shards"), time.monotonic()
    for done, checked in enumerate(verify.check_shards(store, shards, workers), 1):
        report(checked.problems)
        histogram += checked.histogram
        if time.monotonic() - logged > _LOG_EVERY_S:
            log_info(f"{progress.line(done)}, {len(problems)} problems")
            logged = time.monotonic()
    perplexity = (
        f"perplexity of the codes {float(statistics.perplexity(histogram)):.1f}" if histogram.any() else "no codes"
    )
    verified = "" if len(shards) == len(store.shards) else f" in {len(shards)} of {len(store.shards)} shards"
    return problems, f"all checksums and counts are right{verified}; {perplexity}"


def _run(args: cli.Args) -> int:
    try:
        store = Store(args.store, args.stage_to)
    except (UserError, KeyError, TypeError, ValueError) as error:
        if not files.exists(epath.Path(args.store) / MANIFEST):
            raise
        return report_error(str(error), errors.EXIT_ERROR)  # as for any other damage
    if (args.source or args.sheet) and not args.tokenizer:
        raise UserError("--source and --sheet need --tokenizer")
    if args.sheet and pathlib.Path(args.sheet).suffix.lower() != ".png":
        raise UserError(f"--sheet={args.sheet} must end in .png")
    if not args.json:
        print("\n".join([str(store.path), *format_summary(store)]))
    problems, outcome = _verify(store, args) if args.verify else ([], "not verified")
    differences = []
    if args.tokenizer:
        tokenizer = Tokenizer.load(args.tokenizer, store.manifest.get("dtype"))
        if not same_codes(tokenizer.identity(), store.manifest["tokenizer"]):
            raise UserError(f"--tokenizer: {args.tokenizer} did not make the codes of {store.path}")
        if args.sheet:
            write_sheet(store, tokenizer, args.sample, pathlib.Path(args.sheet))
        differences = reencode(store, args.source, tokenizer, args.sample) if args.source else []
    problems += differences
    if args.json:
        report = {"store": str(store.path), **summarize(store), "problems": problems}
        print(json.dumps(report, indent=1, sort_keys=True))
    elif problems:
        print("\n".join([*differences, f"{len(problems)} problem{'s' * (len(problems) > 1)}"]))
    else:
        print(outcome + (f"; {args.sample} scenes re-encoded" if args.source else ""))
    return errors.EXIT_ERROR if problems else errors.EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__, positionals=("store",))
    flags.string("store", None, "store folder; also as the first argument", required=True)
    flags.boolean("json", False, "print JSON")
    flags.boolean("verify", True, "verify all files; --noverify reads only the manifest")
    flags.float("share", 1.0, "share of the shards to verify, evenly spaced")
    flags.string("shard", "", "i/n: verify the share of process i, from 0, of n independent processes")
    flags.integer("workers", None, f"processes that verify; default: cores from {_MIN_IMAGES:,} images on, else 0")
    flags.string("source", "", "source of the store: re-encode a sample of scenes")
    flags.string("tokenizer", "", "tokenizer folder, for --source and --sheet")
    flags.integer("sample", 8, "number of scenes to re-encode and to decode", lower_bound=1)
    flags.string("sheet", "", "PNG file for a contact sheet of decoded scenes")
    flags.string("stage_to", "", "local folder to copy shards to before reading")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
