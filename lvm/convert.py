"""Convert a transformer between workdirs, Hugging Face and EasyLM, or compare two checkpoints.

    lvm convert SRC DST --to=hf --tokenizer=TOKENIZER
    lvm convert --check A B

SRC is a model folder of any known format, recognized by its files (docs/interop.md). DST must not exist; it is written
atomically.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lvm.common import cli, files
from lvm.common.errors import EXIT_DONE, EXIT_ERROR, UserError
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
    print(f"{first} and {second} on {rows} rows of {len(found.max_abs_diff)} random codes, in float32")
    for line in found.report():
        print(line)
    return bool(found.max_abs_diff.max() <= tolerance)


def _run(args: cli.Args) -> int:
    if args.check:
        if not check(args.src, args.dst, args.rows, args.tolerance):
            return EXIT_ERROR
        return EXIT_DONE
    if args.to is None:
        raise UserError(f"--to: missing; one of {', '.join(models.FORMATS)}")
    if args.max_shard_gigabytes <= 0:
        raise UserError(f"--max_shard_gigabytes: {args.max_shard_gigabytes} is not positive")
    written = convert(
        args.src,
        args.dst,
        args.to,
        args.step,
        args.dtype,
        args.vocabulary,
        args.tokenizer,
        int(args.max_shard_gigabytes * 10**9),
    )
    count = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in written.tensors.values())
    vocabulary = written.vocabulary
    log_info(
        f"{args.dst}: {count:,} parameters in {written.dtype}, {vocabulary.num_codes} codes of "
        f"{vocabulary.size} ids, step {written.step}"
    )
    return EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__, positionals=("src", "dst"))
    flags.string("src", None, "a model's folder, or a stream; the first argument", required=True)
    flags.string("dst", None, "the folder to write; the second argument", required=True)
    flags.enum("to", None, models.FORMATS, "what is written")
    flags.integer("step", None, "of a workdir's checkpoints; the newest by default")
    flags.enum("dtype", None, list(DTYPES), "what weights are stored in; as they are by default")
    flags.integer("vocabulary", None, "ids that the model has afterwards, such as 8448 or 8292")
    flags.string("tokenizer", "", "a tokenizer's folder, to put beside --to=hf")
    flags.float("max_shard_gigabytes", models.MAX_SHARD_BYTES / 1e9, "a file of weights of --to=hf")
    flags.boolean("check", False, "compare two checkpoints instead; exit code 1 where they differ")
    flags.integer("rows", 2, "random rows that --check runs", lower_bound=1)
    flags.float("tolerance", 1e-4, "largest difference of a logit that --check passes")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
