"""The five quantizers on one budget: the same network, images and steps for each, measured on other images.

    python -m scripts.benchmark_quantizers --config=configs/photos_tokenizer.py --config.data.source=PHOTOS \
        --config.loop.total_steps=2000 --heldout=OTHER-PHOTOS --out=runs/quantizers

Trains each below --out and compares them with `tokenizer.report` (--out/report). Replaced in the config are the
quantizer, by each at its defaults, `codebook_dim` where the quantizer has its own, and the adversary, by none. A run
that was killed resumes. Prints a Markdown table; step times are medians from the codebook's seed on.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from lvm.common import cli
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.images.sources import open_any_source
from lvm.training import metrics
from scripts.contenders import cpu_name
from tokenizer.adversary import AdversarialConfig
from tokenizer.config import TokenizerConfig
from tokenizer.network import VQGANConfig
from tokenizer.quantizers.base import Quantizer
from tokenizer.quantizers.fsq import FSQ
from tokenizer.quantizers.ibq import IBQ
from tokenizer.quantizers.simvq import SimVQ
from tokenizer.quantizers.vq import L2VQ, VQ
from tokenizer.train import train

KINDS = ("vq", "l2_vq", "simvq", "ibq", "fsq")
_L2_DIM = 8  # channels of codes on the unit sphere, which are learned with few
_FIGURES = (("psnr/rgb", 2), ("ssim/rgb", 3), ("codebook_usage", 3), ("codebook_perplexity", 0))


def with_quantizer(config: VQGANConfig, kind: str) -> VQGANConfig:
    """The network with another quantizer of as many codes, at its defaults; the channels of a code are its own.

    Raises:
      UserError: `fsq` for a codebook size that isn't a power of 4.
    """
    if kind == "fsq":
        channels = round(np.log2(config.codebook_size) / 2)
        if 4**channels != config.codebook_size:
            raise UserError(f"config.model.codebook_size={config.codebook_size} must be a power of 4, for fsq's levels")
        return dataclasses.replace(config, quantizer=FSQ(levels=(4,) * channels), codebook_dim=channels)
    if kind == "l2_vq":
        return dataclasses.replace(config, quantizer=L2VQ(), codebook_dim=_L2_DIM)
    quantizers: dict[str, Quantizer] = {"vq": VQ(), "simvq": SimVQ(), "ibq": IBQ()}
    return dataclasses.replace(config, quantizer=quantizers[kind])


def _run(args: cli.Args) -> None:
    config = from_config_dict(TokenizerConfig, args.config)
    if args.heldout == config.data.source:
        raise UserError(f"--heldout={args.heldout} is config.data.source; give images that no tokenizer sees")
    steps, seed_step = config.loop.with_total_steps(0).total_steps, config.loss.autoencoder_steps
    if steps <= seed_step:
        raise UserError(f"config.loop.total_steps={steps} must be above config.loss.autoencoder_steps={seed_step}")
    open_any_source(args.heldout, config.preprocess)  # fail early
    config = dataclasses.replace(config, adversarial=AdversarialConfig())
    configs = {kind: dataclasses.replace(config, model=with_quantizer(config.model, kind)) for kind in KINDS}
    folders = {kind: pathlib.Path(args.out, kind) for kind in KINDS}
    for kind, folder in folders.items():
        train(configs[kind], str(folder))
    first, *others = map(str, folders.values())
    report = [f"--tokenizer={first}", f"--compare={','.join(others)}", f"--source={args.heldout}"]
    command = [sys.executable, "-m", "tokenizer.report", *report, f"--out={args.out}/report"]
    if code := subprocess.run(command).returncode:
        raise UserError(f"tokenizer.report ended with exit code {code}")
    results = json.loads(pathlib.Path(args.out, "report", "report.json").read_text())
    side = config.model.resolution
    print(f"{cpu_name()}; {steps} steps of {config.batch_size} images of {side}×{side}")
    print(table(results, folders, seed_step))


def table(results: dict[str, Any], folders: dict[str, pathlib.Path], seed_step: int) -> str:
    """A Markdown table of the report's figures and of the median step time after `seed_step`."""
    rows = ["| quantizer | PSNR, dB | SSIM | usage | perplexity | step, ms |", "|---|---|---|---|---|---|"]
    for kind, folder in folders.items():
        cells = [f"{results['figures'][name][kind]['value']:.{digits}f}" for name, digits in _FIGURES]
        lines = [line for line in metrics.read_metrics(folder) if line["step"] > seed_step]
        seconds = np.median([line["step_seconds"] for line in lines if "step_seconds" in line])
        rows.append(f"| `{kind}` | {' | '.join(cells)} | {1000 * seconds:.0f} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string("heldout", None, "image source of images that no tokenizer sees", required=True)
    flags.string("out", None, "folder of the runs and the report", required=True)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
