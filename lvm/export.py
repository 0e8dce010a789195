"""Export the sentences of a mixture as LVM's JSONL.

    lvm export --config=configs/demo_lvm.py --out=sentences.jsonl

Writes the first `--sentences` sentences of the mixture, in training order, without BOS and EOS.
"""

import itertools
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from lvm.common import cli, files
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.mixture.mixture import Mixture
from lvm.data.store.jsonl import SUFFIX, encode_line
from lvm.training.config import TrainConfig


def iter_sentences(mixture: Mixture) -> Iterator[np.ndarray]:
    """Yields the codes of all sentences in order, uint16 [grids, N] each, indefinitely."""
    for block in itertools.count():
        ids, indices = mixture.block(block)
        sentences = {
            component: iter(mixture.components[component].sentences(indices[ids == component]))
            for component in np.unique(ids).tolist()
        }
        for component in ids.tolist():
            yield next(sentences[component])


def _run(args: cli.Args) -> None:
    out, count = pathlib.Path(args.out), args.sentences
    if out.suffix != SUFFIX:
        raise UserError(f"--out={out} must end in {SUFFIX}")
    config = from_config_dict(TrainConfig, args.config)
    with files.atomic_file(out) as file:
        for codes in itertools.islice(iter_sentences(Mixture(config.data, config.seed)), count):
            file.write(encode_line(codes).encode())
    log_info(f"{out}: {count} sentences")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string("out", None, "output file, ending in .jsonl", required=True)
    flags.integer("sentences", 1000, "number of sentences", lower_bound=1)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
