"""Encode an image source into a store of codes.

    python -m tokenizer encode --tokenizer=DIR --source=FOLDER-or-config --out=STORE
    python -m tokenizer encode … --augment=4          four seeded crops and flips of each scene instead of the scene
    python -m tokenizer encode … --shard=0/8          the first of eight groups of shards, as one task of a scheduler
    python -m tokenizer encode --source=FILE.jsonl --out=STORE       codes that exist already
    python -m tokenizer encode --status --out=STORE   progress of all processes together
    python -m tokenizer encode --finish --out=STORE   write the manifest once all shards exist

Each shard holds consecutive files of the source, or scenes; existing shards are skipped. All processes that run the
same command share the shards: each claims the next one that is free, and takes over those of processes that have ended.
With `--shard`, a scheduler distributes groups of shards instead. The bytes don't depend on the number of processes. The
process that completes the last shard writes the manifest.
"""

import dataclasses
import os
import re
import signal
import time
from collections.abc import Sequence

import jax
from etils import epath

from lvm.common import cli, distributed
from lvm.common.distributed import DistributedConfig
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.images.augment import Augment
from lvm.data.images.decode_worker import Limits
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import ImageSource, open_any_source
from lvm.data.store import failures, writer
from lvm.data.store.manifest import HEADER, MANIFEST
from lvm.data.store.reader import Store
from lvm.data.store.shard_queue import ShardQueue
from lvm.data.store.status import describe_progress
from tokenizer.encoding import CodeCopier, Encoder, ShardWriter
from tokenizer.pretrained import Tokenizer

_POLL_S = 1.0
_LIMITS = tuple(field.name for field in dataclasses.fields(Limits))


def parse_shard_flag(spec: str) -> tuple[int, int]:
    """Parses `"2/8"`, the third of eight processes, as (2, 8). Raises UserError."""
    match = re.fullmatch(r"(\d+)/(\d+)", spec)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--shard={spec} must be i/n with i from 0 to n - 1, for example 0/8")
    return int(match[1]), int(match[2])


def summarize_store(folder: str) -> list[str]:
    """Lines with the counts of a finished store and its failures by reason."""
    manifest = Store(folder).manifest
    used, num_codes = manifest["codes_used"], manifest["tokenizer"]["num_codes"]
    line = f"{folder}: {manifest['scenes']} scenes, {manifest['images']} images, {used} of {num_codes} codes used"
    return [line, *failures.describe(folder, manifest["failures"])]


def finish(folder: str) -> None:
    """Writes the manifest if all shards exist."""
    if missing := writer.missing_shards(folder, writer.read_header(folder)["num_shards"]):
        listed = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        log_info(f"{len(missing)} shards are missing ({listed}); the process that writes the last one finishes")
    else:
        finish_now(folder)


def finish_now(folder: str) -> None:
    """Writes the manifest. Raises UserError if shards are missing."""
    if missing := writer.finish_store(folder):
        raise UserError(
            f"{folder}: {len(missing)} shards are missing, or their files have other sizes than their entries say: "
            f"{', '.join(missing[:10])}{' …' if len(missing) > 10 else ''}"
        )
    for line in summarize_store(folder):
        log_info(line)


def encode(args: cli.Args) -> None:
    """Encodes this process's shards."""
    if args.num_shards < 1 or args.batch_size < 1 or (args.workers or 0) < 0:
        raise UserError("--num_shards and --batch_size must be positive, --workers must not be negative")
    for name in _LIMITS:
        if args.workers == 0 and args[name].present:
            raise UserError(f"--{name}: limits worker processes; --workers=0 has none")
    distributed.join(DistributedConfig())
    joined = jax.distributed.is_initialized()
    if joined and args.shard:
        raise UserError(f"--shard={args.shard}: joined processes share the shards without it")
    if joined:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's handler only takes note, for a step to save at
    shard_writer = _make_writer(args)
    if not args.shard:
        _encode_queue(shard_writer, args.out)
        return
    process, num_processes = parse_shard_flag(args.shard)
    if (idle := num_processes - shard_writer.num_shards) > 0:
        log_info(f"{idle} of {num_processes} processes have no shard; raise --num_shards to use them")
    shard_writer.run(process, num_processes)
    finish(args.out)


def _encode_queue(shard_writer: ShardWriter, folder: str) -> None:
    """Shares the shards with all processes that encode the same store; one of them writes the manifest."""
    if (epath.Path(folder) / MANIFEST).exists():
        log_info(f"{folder}: finished before; only missing shards are encoded")
    with ShardQueue(folder, shard_writer.num_shards) as queue:
        shard_writer.run_queue(queue)
        while True:
            with queue.finishing() as is_ours:
                while is_ours and (damaged := writer.finish_store(folder)):
                    queue.require(damaged)
                    shard_writer.run_queue(queue)
            if (epath.Path(folder) / MANIFEST).exists():
                break
            time.sleep(_POLL_S)  # joined processes must exit together
    for line in summarize_store(folder):
        log_info(line)


def _make_writer(args: cli.Args) -> ShardWriter:
    limits = Limits(args.decode_timeout_s, args.decode_memory_gb)
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    # A source of codes needs no tokenizer and ignores the image size.
    augment = Augment(args.augment, tokenizer.preprocess if tokenizer else Preprocess(256))
    source = open_any_source(args.source, augment.source_preprocess)
    for failure in source.skipped_files:
        log_info(f"skipped {failure.key}: {failure.reason}")
    num_shards = min(args.num_shards, len(source)) if source.is_listed else args.num_shards
    if not isinstance(source, ImageSource):
        if augment.copies:
            raise UserError(f"--augment={augment.copies}: the source holds codes, which can't be cropped")
        return CodeCopier(tokenizer, source, args.out, num_shards)
    if tokenizer is None:
        raise UserError("--tokenizer: required to encode images")
    workers = args["workers"].value if "workers" in args else 0  # a check reads no images
    if workers is None:
        workers = max(1, (os.cpu_count() or 1) - 1)
    return Encoder(tokenizer, source, args.out, num_shards, args.batch_size, augment, workers, limits)


def _run(args: cli.Args) -> None:
    if args.status:
        print("\n".join(describe_progress(args.out)))
    elif not args.finish:
        if not args.source:
            raise UserError("--source: required, except with --finish or --status")
        encode(args)
    else:
        finish_now(args.out)


def check(args: cli.Args) -> None:
    """Raises UserError unless a process with these flags could encode: opens tokenizer and source, compares headers."""
    shard_writer = _make_writer(args)
    if (epath.Path(args.out) / HEADER).exists():
        writer.check_header(args.out, shard_writer.header(), shard_writer.num_shards, ignored=("device_kind",))


def define_settings(flags: cli.Flags) -> None:
    """Defines the flags that are equal for all processes."""
    flags.string("tokenizer", "", "tokenizer folder")
    flags.string(
        "source", "", "image source: a folder, a file or a pattern of files, also of gs:// or s3://, or a config"
    )
    flags.string("out", None, "store to write, local or gs://", required=True)
    flags.integer("num_shards", 4, "number of shards")
    flags.integer("batch_size", 64, "images per device and call")
    flags.integer("augment", 0, "seeded crops and flips of each scene; 0 encodes each scene as it is")
    seconds = "a worker's time limit in seconds for a scene, for every 16 images of a longer one"
    flags.float("decode_timeout_s", Limits.decode_timeout_s, seconds)
    flags.float("decode_memory_gb", Limits.decode_memory_gb, "a worker's memory limit in GB")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    define_settings(flags)
    flags.string(
        "shard", "", "i/n: encode group i, from 0, of n groups of shards; default: shards that no other process encodes"
    )
    flags.boolean("status", False, "only print shards, rate and time left over all processes, and stale claims")
    flags.boolean("finish", False, "only write the manifest, if all shards exist")
    workers = "processes that read images; 0 for threads of this one, which a damaged file can end; default: cores - 1"
    flags.integer("workers", None, workers)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
