"""Converts a tokenizer between our workdirs and the published layouts.

    python -m tokenizer.convert SRC DST --to=orbax

SRC is a folder of any kind, found out by what is in it, or a bare weights file with a small config.json beside it
(docs/interop.md). DST is new; it is written as a whole or not at all, and never holds a pickle.
"""

from __future__ import annotations

import sys

from absl import flags

from lvm.common import cli
from lvm.common.logging import log_info
from lvm.model.nnx_utils import count_params
from tokenizer import weights


def main() -> None:
    """The command."""
    found = weights.read(_SRC.value)
    weights.write(_DST.value, found, _TO.value)
    config = found.config
    log_info(
        f"{_DST.value}: {count_params(found.params):,} parameters, {config.codebook_size} codes of "
        f"{config.codebook_dim}, {config.num_codes_per_image} an image of {config.resolution}×{config.resolution}, "
        f"{found.preprocess.mode}"
    )


if __name__ == "__main__":
    _SRC = flags.DEFINE_string(
        "src", None, "a tokenizer's folder or weights file; the first argument", required=True
    )
    _DST = flags.DEFINE_string("dst", None, "the folder to write; the second argument", required=True)
    _TO = flags.DEFINE_enum("to", None, weights.KINDS, "what is written", required=True)
    sys.argv = cli.positionals_to_flags(sys.argv, ("src", "dst"))
    cli.run(main)
