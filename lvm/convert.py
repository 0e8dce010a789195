"""Convert a transformer between workdirs, Hugging Face and EasyLM, or compare two checkpoints.

    lvm convert SRC DST --to=hf --tokenizer=TOKENIZER
    lvm convert --check A B

SRC is a model folder of any known format, recognized by its files (docs/interop.md). DST must not exist; it is written
atomically.
"""

import functools
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
    """Converts a checkpoint into a new folder; returns what was written.

    Args:
      src, dst: a model folder of any format, and the new folder.
      format: of `dst`, one of `lvm.interop.models.FORMATS`.
      step: a step of the workdir `src`; the newest by default.
      dtype: one of `DTYPES`; as stored by default.
      vocabulary_size: see `resize_vocabulary`; unchanged by default.
      tokenizer: folder of a tokenizer to include; "hf" only.
      max_shard_bytes: size of a weights file; "hf" only.

    Raises:
      UserError: see `lvm.interop.models`; or the tokenizer isn't the model's, or diffusers has no such network.
    """
    if tokenizer and format != "hf":
        raise UserError(f"--tokenizer={tokenizer} is only supported with --to=hf, not --to={format}")
    checkpoint = models.read(src, step)
    if vocabulary_size is not None:
        checkpoint = resize_vocabulary(checkpoint, vocabulary_size)
    if dtype is not None:
        checkpoint = with_dtype(checkpoint, dtype)
    write_card = functools.partial(_write_card, checkpoint=checkpoint, tokenizer=tokenizer)
    models.write(dst, checkpoint, format, max_shard_bytes, write_card if format == "hf" else lambda folder: None)
    return checkpoint


def _write_card(folder: pathlib.Path, checkpoint: LazyCheckpoint, tokenizer: str) -> None:
    """Writes the model card, and the tokenizer with an example script if one is given."""
    identity: Mapping[str, Any] | None = checkpoint.record["tokenizer"]
    if tokenizer:
        loaded = weights.read(tokenizer)
        identity = Tokenizer(loaded.config, loaded.preprocess, loaded.params).identity()
        models.check_tokenizer(checkpoint.record["tokenizer"], checkpoint.vocabulary, identity, tokenizer)
        try:
            weights.write(folder / card.TOKENIZER, loaded, "diffusers")
        except UserError as error:
            raise UserError(f"--tokenizer={tokenizer}: {error}") from None
        files.write_atomically(folder / card.EXAMPLE, card.example_script(loaded.preprocess).encode())
    else:
        log_info(f"no {card.TOKENIZER}/ and {card.EXAMPLE} are written; use --tokenizer=FOLDER to include them")
    text = card.model_card(checkpoint, identity, bool(tokenizer))
    files.write_atomically(folder / card.README, text.encode())


def check(first: str, second: str, num_rows: int, tolerance: float) -> bool:
    """Prints a comparison of two checkpoints; returns whether their logits agree within `tolerance`."""
    comparison = compare(models.read(first), models.read(second), num_rows)
    context = len(comparison.max_abs_diff)
    print(f"{first} and {second} on {num_rows} rows of {context} random codes, in float32")
    for line in comparison.report():
        print(line)
    return bool(comparison.max_abs_diff.max() <= tolerance)


def _run(args: cli.Args) -> int:
    if args.check:
        return EXIT_DONE if check(args.src, args.dst, args.rows, args.tolerance) else EXIT_ERROR
    if args.to is None:
        raise UserError(f"--to is missing; use one of {', '.join(models.FORMATS)}")
    if args.max_shard_gigabytes <= 0:
        raise UserError(f"--max_shard_gigabytes={args.max_shard_gigabytes} must be positive")
    shard_bytes = int(args.max_shard_gigabytes * 10**9)
    written = convert(args.src, args.dst, args.to, args.step, args.dtype, args.vocabulary, args.tokenizer, shard_bytes)
    count, vocabulary = sum(tensor.size for tensor in written.tensors.values()), written.vocabulary
    sizes = f"{count:,} parameters in {written.dtype}, {vocabulary.num_codes} codes of {vocabulary.size} ids"
    log_info(f"{args.dst}: {sizes}, step {written.step}")
    return EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__, positionals=("src", "dst"))
    flags.string("src", None, "model folder or stream; the first argument", required=True)
    flags.string("dst", None, "folder to write; the second argument", required=True)
    flags.enum("to", None, models.FORMATS, "format to write")
    flags.integer("step", None, "step of a workdir; the newest by default")
    flags.enum("dtype", None, list(DTYPES), "dtype of the weights; as stored by default")
    flags.integer("vocabulary", None, "resize the vocabulary to this many ids, e.g. 8448")
    flags.string("tokenizer", "", "tokenizer folder to include with --to=hf")
    flags.float("max_shard_gigabytes", models.MAX_SHARD_BYTES / 1e9, "size of a weights file of --to=hf")
    flags.boolean("check", False, "compare two checkpoints; exit code 1 if they differ")
    flags.integer("rows", 2, "random rows of --check", lower_bound=1)
    flags.float("tolerance", 1e-4, "largest logit difference that --check accepts")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
