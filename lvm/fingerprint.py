"""Print one hash of the batches that a config trains on.

    lvm fingerprint --config=configs/demo_lvm.py --batches=200

The last line is the SHA-256 of the `tokens` of batches `--start` … `--start + --batches − 1`, int32 little-endian in
global row order. It doesn't depend on the number of processes or workers. In a run of several processes
(`lvm.common.distributed`) each reads the rows of its own devices only. With `--out`, process 0 also writes the hashed
bytes: the files of two consecutive ranges, concatenated, are the file of their union.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from lvm.common import cli, distributed
from lvm.common.config import from_config_dict
from lvm.data.mixture import loader
from lvm.hardware import sharding
from lvm.training.config import TrainConfig, make_rows


def token_bytes(config: TrainConfig, start: int, count: int, workers: int) -> Iterator[bytes]:
    """Yields the tokens of the global batches from `start` on, on every process; each reads its own rows."""
    rows = make_rows(config)
    shape = rows.batch_spec["tokens"].shape
    rows_sharding = sharding.batch_sharding(sharding.make_mesh(config.mesh), shape[0])  # the training loop's
    local = loader.local_rows(rows_sharding, shape)
    read = functools.partial(rows.batch, rows=local)
    for batch in loader.prefetch_batches(read, start, start + count, workers):
        tokens = loader.to_global(batch["tokens"], local, rows_sharding, shape)
        yield np.ascontiguousarray(distributed.fetch(tokens), "<i4").tobytes()


def _run(args: cli.Args) -> None:
    config = from_config_dict(TrainConfig, args.config)
    distributed.join(config.distributed)
    digest = hashlib.sha256()
    with open(args.out if args.out and distributed.is_first() else os.devnull, "wb") as out:
        for content in token_bytes(config, args.start, args.batches, args.workers):
            digest.update(content)
            out.write(content)
    print(digest.hexdigest(), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.config()
    flags.integer("batches", 200, "number of batches", lower_bound=1)
    flags.integer("start", 0, "step of the first batch", lower_bound=0)
    flags.integer("workers", 0, "worker processes that read, for each process; 0 for threads", lower_bound=0)
    flags.string("out", None, "file for the hashed bytes")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
