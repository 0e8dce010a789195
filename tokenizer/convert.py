"""Convert a tokenizer between workdirs and published layouts.

    python -m tokenizer convert SRC DST --to=orbax

SRC is a folder of any known layout, recognized by its files, or a weights file with a small config.json beside it
(docs/interop.md). DST must not exist; it is written atomically and never contains a pickle.
"""

from __future__ import annotations

from collections.abc import Sequence

from lvm.common import cli
from lvm.common.logging import log_info
from lvm.model.nnx_utils import count_params
from tokenizer import weights


def _run(args: cli.Args) -> None:
    found = weights.read(args.src)
    weights.write(args.dst, found, args.to)
    config = found.config
    log_info(
        f"{args.dst}: {count_params(found.params):,} parameters, {config.codebook_size} codes of "
        f"{config.codebook_dim}, {config.codes_per_image} an image of {config.resolution}×{config.resolution}, "
        f"{found.preprocess.mode}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__, positionals=("src", "dst"))
    flags.string("src", None, "a tokenizer's folder or weights file; the first argument", required=True)
    flags.string("dst", None, "the folder to write; the second argument", required=True)
    flags.enum("to", None, weights.KINDS, "what is written", required=True)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
