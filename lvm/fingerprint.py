"""What training reads, as one hash: `python -m lvm.fingerprint --config=configs/demo_lvm.py --batches=200`.

The last line is the SHA-256 of the `tokens` of the batches `--start` … `--start` + `--batches` − 1, int32
little-endian in global row order. It is the same on any number of processes, with any number of workers, and
wherever it begins. Of several processes, joined as those of a training are (`lvm.common.distributed`), each reads the
rows of its own devices alone. With `--out`, process 0 also writes the bytes that were hashed: those of two
runs, one after the other, are those of one run over both.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from typing import IO

import numpy as np
from absl import flags
from ml_collections import config_flags

from lvm.common import cli, distributed
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.mixture import loader
from lvm.data.mixture.mixture import Mixture
from lvm.data.mixture.rows import Rows
from lvm.hardware import sharding
from lvm.model.vocabulary import Vocabulary
from lvm.training.config import TrainConfig


def make_rows(config: TrainConfig, split: str = "train") -> Rows:
    """The rows that a configuration trains on."""
    mixture = Mixture(config.data, config.seed, split)
    vocabulary = Vocabulary.for_codes(mixture.stores[0].num_codes)
    return Rows(mixture, vocabulary, config.model.context, config.batch_size)


def token_bytes(config: TrainConfig, start: int, count: int, workers: int) -> Iterator[bytes]:
    """The tokens of the global batches from `start` on, on every process; each reads its own rows."""
    rows = make_rows(config)
    shape = rows.batch_spec["tokens"].shape
    # As the loop does: rows lie where the mesh puts them.
    rows_sharding = sharding.batch_sharding(sharding.make_mesh(config.mesh), shape[0])
    mine = loader.local_rows(rows_sharding, shape)
    read = functools.partial(rows.batch, rows=mine)
    for batch in loader.prefetch_batches(read, start, start + count, workers):
        tokens = loader.to_global(batch["tokens"], mine, rows_sharding, shape)
        yield np.ascontiguousarray(distributed.fetch(tokens), "<i4").tobytes()


def main() -> None:
    """The command."""
    for name, value, least in (
        ("batches", _BATCHES.value, 1),
        ("start", _START.value, 0),
        ("workers", _WORKERS.value, 0),
    ):
        if value < least:
            raise UserError(f"--{name}: {value} is too small; it is at least {least}")
    config = from_config_dict(TrainConfig, _CONFIG.value)
    distributed.join(config.distributed)
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        out: IO[bytes] | None = None
        if _OUT.value and distributed.is_first():
            out = stack.enter_context(open(_OUT.value, "wb"))
        for content in token_bytes(config, _START.value, _BATCHES.value, _WORKERS.value):
            digest.update(content)
            if out:
                out.write(content)
    print(digest.hexdigest(), flush=True)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", help_string="a file of configs/", lock_config=True)
    _BATCHES = flags.DEFINE_integer("batches", 200, "how many batches")
    _START = flags.DEFINE_integer("start", 0, "the first one's step")
    _WORKERS = flags.DEFINE_integer("workers", 0, "processes that read for each process; 0 for threads")
    _OUT = flags.DEFINE_string("out", None, "file for the tokens themselves")
    flags.mark_flag_as_required("config")
    cli.run(main)
