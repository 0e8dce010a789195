"""Measure tokenizers on the images of a source: index.html and report.json.

    python -m tokenizer.report --tokenizer=DIR --source=FOLDER-or-config --out=REPORT
    python -m tokenizer.report --tokenizer=DIR --compare=DIR,DIR --source=FOLDER --out=REPORT    side by side

PSNR, SSIM, LPIPS and FID of the reconstructions, use of the codebook beside that of a uniform one, codes that bfloat16
changes, best and worst images. LPIPS and FID need weights from local files (docs/tokenizer.md). Statistics of the
images' features are kept in --statistics for the next report on them.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence

from etils import epath

from lvm.common import cli, files
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.images.decode_worker import Limits
from lvm.data.images.sources import ImageSource, open_any_source
from lvm.evaluation.compare import name_folders
from tokenizer.evaluation import inception
from tokenizer.evaluation.fid import EVALUATOR, FeatureStatistics
from tokenizer.evaluation.image_batches import ImageBatches
from tokenizer.evaluation.measure import FID_STREAM, Measurement, Networks
from tokenizer.evaluation.page import write_report
from tokenizer.perceptual.lpips import LPIPS
from tokenizer.pretrained import Tokenizer


def report(args: cli.Args) -> None:
    """Measures the tokenizers of `args` and writes the report.

    Raises:
      UserError: a tokenizer, weights or a source that can't be read, or a source without images.
    """
    folders = [args.tokenizer, *args.compare]
    tokenizers = {name: Tokenizer.load(path) for name, path in zip(name_folders(folders), folders, strict=True)}
    networks = _load_networks(args, tokenizers)
    measurements: dict[str, Measurement] = {}
    for name, tokenizer in tokenizers.items():
        source = open_any_source(args.source, tokenizer.preprocess)
        if not isinstance(source, ImageSource):
            raise UserError(f"--source={args.source}: holds ready codes; a report needs the images")
        log_info(f"measuring {name}: {tokenizer}")
        workers = max(1, (os.cpu_count() or 1) - 1) if args.workers is None else args.workers
        batches = ImageBatches(
            source, tokenizer.preprocess, args.batch_size * tokenizer.num_devices, workers,
            Limits(args.decode_timeout_s, args.decode_memory_gb), args.max_images,
        )  # fmt: skip
        measurements[name] = _measure(args, tokenizer, networks, source, batches)
    request = {
        "source": source.describe(),
        "source_path": args.source,
        "max_images": args.max_images,
        "fid_evaluator": EVALUATOR if networks.inception is not None else None,
    }
    write_report(args.out, request, measurements)
    log_info(f"wrote {epath.Path(args.out) / 'index.html'} and report.json beside it")


def _load_networks(args: cli.Args, tokenizers: Mapping[str, Tokenizer]) -> Networks:
    lpips = inception_params = None
    if args.lpips_weights or args.lpips_heads:
        network = LPIPS(weights=args.lpips_weights, heads=args.lpips_heads)
        for name, tokenizer in tokenizers.items():
            if (side := tokenizer.config.resolution) < network.min_resolution:
                raise UserError(
                    f"--lpips_weights: images of {name} are {side} wide; LPIPS needs {network.min_resolution}"
                )
        lpips = network.load("--lpips_")
    if args.inception_weights:
        inception_params = inception.load(args.inception_weights, "--inception_weights")
    return Networks(lpips, inception_params)


def _measure(
    args: cli.Args, tokenizer: Tokenizer, networks: Networks, source: ImageSource, batches: ImageBatches
) -> Measurement:
    """One pass of a tokenizer over the source; keeps the statistics of the images' features."""
    path = _statistics_path(args, tokenizer, source) if networks.inception is not None else None
    known = FeatureStatistics.load(path) if path and path.exists() else None
    measurement = Measurement(tokenizer, networks, known, args.examples)
    measurement.run(batches)
    if not measurement.num_images:
        raise UserError(f"--source={args.source}: none of its images could be read; reasons are above")
    count = measurement.num_images[FID_STREAM]
    if known and known.count != count:
        raise UserError(f"{path}: of {known.count} images, and {count} could be read now; remove it")
    if path and not known and count:
        measurement.image_features.save(path)
    return measurement


def _statistics_path(args: cli.Args, tokenizer: Tokenizer, source: ImageSource) -> epath.Path:
    """The file of the images' feature statistics, named by all that they depend on."""
    weights = files.sha256(args.inception_weights)
    identity = [EVALUATOR, weights, source.describe(), args.max_images, tokenizer.preprocess.to_json()]
    name = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return epath.Path(args.statistics or os.path.join(args.out, "feature_statistics")) / f"{name}.npz"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.string("tokenizer", None, "tokenizer folder", required=True)
    flags.string("source", None, "image source: a folder, a file or a pattern of files, or a config", required=True)
    flags.string("out", None, "folder for index.html and report.json", required=True)
    flags.comma_list("compare", (), "folders of more tokenizers, which are compared with the first")
    flags.string("lpips_weights", "", "weights of VGG16, as of config.loss.perceptual.weights")
    flags.string("lpips_heads", "", "heads of LPIPS, as of config.loss.perceptual.heads")
    flags.string("inception_weights", "", "weights of FID's Inception, as pytorch-fid has them")
    flags.string("statistics", "", "folder of feature statistics; default: feature_statistics/ of --out")
    flags.integer("batch_size", 32, "images per device and call", lower_bound=1)
    flags.integer("max_images", 0, "only the first images of the source; 0 for all", lower_bound=0)
    flags.integer("examples", 8, "images shown of the best, the worst and a sample", lower_bound=1)
    flags.integer(
        "workers", None, "processes that decode; 0 for threads of this one; default: cores - 1", lower_bound=0
    )
    flags.float("decode_timeout_s", Limits.decode_timeout_s, "a worker's time limit in seconds for 16 images")
    flags.float("decode_memory_gb", Limits.decode_memory_gb, "a worker's memory limit in GB")
    return flags.run(report, argv)


if __name__ == "__main__":
    cli.exit_process(main())
