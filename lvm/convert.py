"""Converts a transformer between our workdirs and what others load, and compares two checkpoints.

    python -m lvm.convert SRC DST --to=hf --tokenizer=T
    python -m lvm.convert --check A B

SRC is a folder of any kind, found out by what is in it (docs/interop.md). DST is new; it is written as a whole or not
at all.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from lvm.common import cli, files
from lvm.common.errors import EXIT_ERROR, UserError
from lvm.common.logging import log_info
from lvm.interop import card, models
from lvm.interop.compare import compare
from lvm.interop.lazy_checkpoint import DTYPES, LazyCheckpoint, resize_vocabulary, with_dtype
from tokenizer import Tokenizer, weights


def convert(
    src: str,
    dst: str,
    format: str,
    step: int | None = None,
    dtype: str | None = None,
    vocabulary_size: int | None = None,
    tokenizer: str = "",
    max_shard_bytes: int = models.MAX_SHARD_BYTES,
) -> LazyCheckpoint:
    """Reads a model and writes it into a new folder; returns what was written.

    Args:
      src, dst: folders.
      format: of `dst`, one of `lvm.interop.models.FORMATS`.
      step: of a workdir's checkpoints; the newest by default.
      dtype: one of `DTYPES`; as stored by default.
      vocabulary_size: ids that the model has afterwards (`resize_vocabulary`); as many by default.
      tokenizer: a tokenizer's folder, written beside the weights of "hf".
      max_shard_bytes: bytes of a file of weights of "hf".

    Raises:
      UserError: see `lvm.interop.models`; or a tokenizer that isn't the model's, or has no layout of diffusers.
    """
    if tokenizer and format != "hf":
        raise UserError(
            f"--tokenizer: {tokenizer}: goes beside the weights of --to=hf alone, not of {format}"
        )
    checkpoint = models.read(src, step)
    if vocabulary_size is not None:
        checkpoint = resize_vocabulary(checkpoint, vocabulary_size)
    if dtype is not None:
        checkpoint = with_dtype(checkpoint, dtype)

    def finalize(folder: pathlib.Path) -> None:
        if format == "hf":
            _describe(folder, checkpoint, tokenizer)

    models.write(dst, checkpoint, format, max_shard_bytes, finalize)
    return checkpoint


def _describe(folder: pathlib.Path, checkpoint: LazyCheckpoint, tokenizer: str) -> None:
    """Writes the model card; the tokenizer and the example too, where one is given."""
    identity: Mapping[str, Any] | None = checkpoint.record["tokenizer"]
    if tokenizer:
        found = weights.read(tokenizer)
        identity = Tokenizer(found.config, found.preprocess, found.params).identity()
        models.check_tokenizer(checkpoint.record["tokenizer"], checkpoint.vocabulary, identity, tokenizer)
        try:
            weights.write(folder / card.TOKENIZER, found, "diffusers")
        except UserError as error:
            raise UserError(f"--tokenizer: {tokenizer}: {error}") from None
        files.write_atomically(folder / card.EXAMPLE, card.example_script(found.preprocess).encode())
    else:
        log_info(
            f"no {card.TOKENIZER}/ and no {card.EXAMPLE}: --tokenizer=FOLDER puts a published kind there"
        )
    readme = card.model_card(checkpoint, identity, bool(tokenizer))
    files.write_atomically(folder / card.README, readme.encode())


def check(first: str, second: str, rows: int, tolerance: float) -> bool:
    """Prints how two checkpoints differ; returns whether their logits agree."""
    found = compare(models.read(first), models.read(second), rows)
    log_info(f"{first} and {second} on {rows} rows of {len(found.max_abs_diff)} random codes, in float32")
    for line in found.report():
        log_info(line)
    return bool(found.max_abs_diff.max() <= tolerance)


def main() -> None:
    """The command."""
    if _CHECK.value:
        if not check(_SRC.value, _DST.value, _ROWS.value, _TOLERANCE.value):
            sys.exit(EXIT_ERROR)
        return
    if _TO.value is None:
        raise UserError(f"--to: missing; one of {', '.join(models.FORMATS)}")
    if _MAX_SHARD.value <= 0:
        raise UserError(f"--max_shard_gigabytes: {_MAX_SHARD.value} is not positive")
    written = convert(
        _SRC.value,
        _DST.value,
        _TO.value,
        _STEP.value,
        _DTYPE.value,
        _VOCABULARY.value,
        _TOKENIZER.value,
        int(_MAX_SHARD.value * 10**9),
    )
    count = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in written.tensors.values())
    vocabulary = written.vocabulary
    log_info(
        f"{_DST.value}: {count:,} parameters in {written.dtype}, {vocabulary.num_codes} codes of "
        f"{vocabulary.size} ids, step {written.step}"
    )


if __name__ == "__main__":
    _SRC = flags.DEFINE_string(
        "src", None, "a model's folder, or a stream; the first argument", required=True
    )
    _DST = flags.DEFINE_string("dst", None, "the folder to write; the second argument", required=True)
    _TO = flags.DEFINE_enum("to", None, models.FORMATS, "what is written")
    _STEP = flags.DEFINE_integer("step", None, "of a workdir's checkpoints; the newest by default")
    _DTYPE = flags.DEFINE_enum(
        "dtype", None, list(DTYPES), "what weights are stored in; as they are by default"
    )
    _VOCABULARY = flags.DEFINE_integer(
        "vocabulary", None, "ids that the model has afterwards, such as 8448 or 8292"
    )
    _TOKENIZER = flags.DEFINE_string("tokenizer", "", "a tokenizer's folder, to put beside --to=hf")
    _MAX_SHARD = flags.DEFINE_float(
        "max_shard_gigabytes", models.MAX_SHARD_BYTES / 1e9, "a file of weights of --to=hf"
    )
    _CHECK = flags.DEFINE_bool(
        "check", False, "compare two checkpoints instead; exit code 1 where they differ"
    )
    _ROWS = flags.DEFINE_integer("rows", 2, "random rows that --check runs", lower_bound=1)
    _TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "largest difference of a logit that --check passes")
    sys.argv = cli.positionals_to_flags(sys.argv, ("src", "dst"))
    cli.run(main)
