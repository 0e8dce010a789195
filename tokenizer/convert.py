"""Convert a tokenizer between workdirs and published layouts.

    python -m tokenizer convert SRC DST --to=orbax

SRC is a folder of any known layout, recognized by its files, or a weights file with a small config.json beside it
(docs/interop.md). DST must not exist; it is written atomically and never contains a pickle.
"""

from collections.abc import Sequence

from lvm.common import cli
from lvm.common.logging import log_info
from lvm.model.nnx_utils import count_params
from tokenizer import weights


def _run(args: cli.Args) -> None:
    stored = weights.read(args.src)
    weights.write(args.dst, stored, args.to)
    config = stored.config
    log_info(
        f"{args.dst}: {count_params(stored.params):,} parameters, {config.codebook_size} codes of "
        f"{config.codebook_dim}, {config.codes_per_image} per image of {config.resolution}×{config.resolution}, "
        f"{stored.preprocess.mode}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__, positionals=("src", "dst"))
    flags.string("src", None, "tokenizer folder or weights file; first argument", required=True)
    flags.string("dst", None, "folder to write; second argument", required=True)
    flags.enum("to", None, weights.KINDS, "output layout", required=True)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
