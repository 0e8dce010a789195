"""Encode an image source into a store of codes.

    python -m tokenizer encode --tokenizer=DIR --source=FOLDER-or-config --out=STORE
    python -m tokenizer encode … --augment=4          four seeded crops and flips of each scene instead of the scene
    python -m tokenizer encode … --shard=0/8          one of eight independent processes
    python -m tokenizer encode --source=FILE.jsonl --out=STORE       codes that exist already
    python -m tokenizer encode --finish --out=STORE   write the manifest once all shards exist

Each output shard holds a contiguous slice of the input's scenes; existing shards are skipped. Several processes share
the shards, by `--shard` or when a launcher joins them (`lvm.common.distributed`); the bytes don't depend on their
number. The process that completes the last shard writes the manifest.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence

import jax
import numpy as np

from lvm.common import cli, distributed
from lvm.common.distributed import DistributedConfig
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.images.augment import Augment
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import ImageSource, open_any_source
from lvm.data.store import writer
from lvm.data.store.reader import Store
from tokenizer.encoding import CodeCopier, Encoder, ShardWriter
from tokenizer.pretrained import Tokenizer

_POLL = 1.0  # seconds
_FEW = 1000  # scenes that are read before other processes would have started


def parse_shard_flag(spec: str) -> tuple[int, int]:
    """`"2/8"` → (2, 8): the third of eight. Raises UserError."""
    found = re.fullmatch(r"(\d+)/(\d+)", spec)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--shard: {spec!r}; it is i/n with i from 0 to n - 1, such as 0/8")
    return int(found[1]), int(found[2])


def summarize_store(folder: str) -> str:
    """What a finished store holds, in a line."""
    manifest = Store(folder).manifest
    used, codes = np.count_nonzero(manifest["histogram"]), len(manifest["histogram"])
    failures = sum(len(shard["failures"]) for shard in manifest["shards"])
    failed = f", {failures} failures listed" if failures else ""
    return f"{folder}: {manifest['scenes']} scenes, {manifest['images']} images, {used} of {codes} codes used{failed}"


def finish(folder: str, wait: bool) -> None:
    """Writes the manifest once all shards are there.

    Args:
      folder: the store.
      wait: until the other processes' are, too: those that were joined leave together.
    """
    while missing := writer.finish_store(folder):
        if not wait:
            listed = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
            log_info(
                f"{len(missing)} shards aren't there yet ({listed}); whoever writes the last one ends the store"
            )
            return
        time.sleep(_POLL)
    log_info(summarize_store(folder))


def encode(args: cli.Args) -> None:
    """Encodes this process's shards."""
    if args.num_shards < 1 or args.batch_size < 1 or (args.workers or 0) < 0:
        raise UserError("--num_shards and --batch_size must be at least 1, --workers at least 0")
    distributed.join(DistributedConfig())
    joined = jax.distributed.is_initialized()
    if joined and args.shard:
        raise UserError("--shard: these processes are joined already, and share the shards by themselves")
    part, parts = parse_shard_flag(args.shard) if args.shard else (jax.process_index(), jax.process_count())
    writer = _writer(args)
    if parts > (shards := writer.num_shards):
        log_info(
            f"{shards} shards leave {parts - shards} of {parts} processes without work; --num_shards makes more"
        )
    writer.run(part, parts)
    finish(args.out, wait=joined)


def _writer(args: cli.Args) -> ShardWriter:
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    # Ready codes need no tokenizer, and are not looked at by the size of its images.
    augment = Augment(args.augment, tokenizer.preprocess if tokenizer else Preprocess(256))
    source = open_any_source(args.source, augment.source_preprocess)
    for skipped in source.skipped:
        log_info(f"skipped {skipped.key}: {skipped.reason}")
    num_shards = min(args.num_shards, len(source))
    if not isinstance(source, ImageSource):
        if augment.copies:
            raise UserError("--augment: the source holds ready codes, which can't be cropped")
        return CodeCopier(tokenizer, source, args.out, num_shards)
    if tokenizer is None:
        raise UserError("--tokenizer: must be given to encode images")
    workers = args.workers
    if workers is None:
        workers = max(1, (os.cpu_count() or 1) - 1) if len(source) >= _FEW else 0
    return Encoder(tokenizer, source, args.out, num_shards, args.batch_size, augment, workers)


def _run(args: cli.Args) -> None:
    if not args.finish:
        if not args.source:
            raise UserError("--source: must be given to encode; only --finish needs none")
        encode(args)
    elif missing := writer.finish_store(args.out):
        raise UserError(f"{args.out}: {len(missing)} shards are missing: {', '.join(missing[:10])}")
    else:
        log_info(summarize_store(args.out))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.string("tokenizer", "", "a tokenizer's folder")
    flags.string("source", "", "a folder of images or a source's config file")
    flags.string("out", None, "the store to write, local or gs://", required=True)
    flags.integer("num_shards", 4, "how many files the store is cut into")
    flags.integer("batch_size", 64, "images a device in each call")
    flags.integer("augment", 0, "seeded crops and flips of each scene; 0: each as it is")
    flags.string("shard", "", "i/n: this process does the i-th of n parts, from 0 on")
    flags.boolean("finish", False, "write the manifest of shards that are there, and nothing else")
    flags.integer(
        "workers",
        None,
        f"processes that read images, 0: threads; by default all cores but one, for sources of {_FEW} scenes or more",
    )
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
