"""Evaluate a model on held-out scenes: results.json and index.html.

lvm evaluate --config=configs/eval_demo.py --model=MODEL --tokenizer=TOKENIZER --out=FOLDER
lvm evaluate --compare=FOLDER,FOLDER,… --out=COMPARISON
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lvm.common import cli, distributed, files
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.images.sources import ImageSource, open_source
from lvm.data.images.sources.derived import DerivedStreams
from lvm.data.mixture.mixture import MixtureConfig
from lvm.evaluation import report
from lvm.evaluation.compare import load_all, write_comparison
from lvm.evaluation.config import EvalConfig, LPIPSConfig
from lvm.evaluation.evaluator import Context, Tokenizer
from lvm.evaluation.heldout import check_source
from lvm.evaluation.image_metrics import Compare
from lvm.evaluation.run import run_evaluations
from lvm.hardware.sharding import make_mesh
from lvm.inference.pretrained import LVM
from lvm.interop.models import check_tokenizer
from lvm.model.nnx_utils import Params
from tokenizer import Tokenizer as LoadedTokenizer
from tokenizer.perceptual.lpips import LPIPS


def with_derived(source: ImageSource, derived: Sequence[str]) -> ImageSource:
    """The source with those of the `derived` streams that it lacks, of the seed of those that it has."""
    lacking = [stream for stream in derived if stream not in source.streams]
    return DerivedStreams(source, lacking, source.describe().get("derived_seed", 0)) if lacking else source


def evaluate(config: EvalConfig, model_folder: str, tokenizer_folder: str, out: str) -> dict[str, Any]:
    """Runs the evaluations that `out` has no results of yet; returns the content of `results.json`."""
    distributed.join(config.distributed)
    mesh = make_mesh(config.mesh)
    model = LVM.load(model_folder, mesh=mesh if mesh.size > 1 else None)
    loaded = LoadedTokenizer.load(tokenizer_folder)
    check_tokenizer(model.record["tokenizer"], model.vocabulary, loaded.identity(), tokenizer_folder)
    tokenizer = Tokenizer.of(loaded, config.batch_size)
    mixture = _mixture(config, model, model_folder)
    source = None
    if config.source:
        source = with_derived(open_source(config.source, loaded.preprocess), config.derived)
        check_source(source, model.record["sources"], config.unseen, config.source)
    context = Context(
        model,
        tokenizer,
        mixture,
        source,
        config.unseen,
        config.max_scenes,
        config.seed,
        {"model": model_folder, "tokenizer": tokenizer_folder},
        config.batch_size,
        _lpips(config.lpips, loaded.preprocess.resolution, config.batch_size) if config.lpips else None,
    )
    settings = to_json(config)
    request = files.as_json(
        {
            # Figures don't depend on the batch size and the devices.
            "config": {key: settings[key] for key in ("unseen", "max_scenes", "seed", "data", "lpips")},
            "model": {"record": model.record, "step": model.step, "parameters": model.num_params},
            "tokenizer": tokenizer.identity["hash"],
            "source": source and source.describe(),
        }
    )
    records = run_evaluations(config.evaluations, context, out, request)
    results = report.collect_results(request, records)
    if distributed.is_first():
        path = epath.Path(out) / "results.json"
        if files.read_side_file(path) == files.as_json(results) and (epath.Path(out) / "index.html").exists():
            log_info(f"{path} is up to date")
        else:
            report.write_report(out, results, records)
            log_info(f"wrote {epath.Path(out) / 'index.html'} and results.json beside it")
    return results


def _mixture(config: EvalConfig, model: LVM, folder: str) -> MixtureConfig:
    """The mixture of training, or `config.data` if the model doesn't record it."""
    recorded = model.record.get("config", {}).get("data")
    if recorded is not None:
        return from_config_dict(MixtureConfig, recorded, f"{folder}: config.data")
    if not config.data.components:
        raise UserError(
            f"config.data.components is empty, and {folder} doesn't record its training mixture; "
            "give components with the recipes to evaluate"
        )
    fraction = model.record.get("heldout_fraction")  # of a workdir of an earlier version
    if fraction not in (None, config.data.heldout_fraction):
        raise UserError(
            f"config.data.heldout_fraction={config.data.heldout_fraction} must be {fraction}, as in the training of "
            f"{folder}: other scenes may have been trained on"
        )
    return config.data


def _lpips(config: LPIPSConfig, resolution: int, batch_size: int) -> Compare:
    """LPIPS of images uint8 [B, H, W, 3]; all processes share the images of a call."""
    network = LPIPS(weights=config.weights, heads=config.heads)
    if resolution < network.min_resolution:
        raise UserError(
            f"config.lpips: the tokenizer's images are {resolution} pixels wide; LPIPS needs {network.min_resolution}"
        )
    params = network.load("config.lpips.")

    @jax.jit
    def distances(params: Params, pairs: jax.Array) -> jax.Array:
        images = pairs.astype(jnp.float32) / 255
        return network.distances(params, images[:, 0], images[:, 1], "float32")

    def of_pairs(pairs: np.ndarray) -> np.ndarray:
        batches = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
        return np.concatenate([np.asarray(distances(params, batch)) for batch in batches])

    return lambda images, truth: distributed.map_rows(of_pairs, np.stack([images, truth], axis=1))


def _run(args: cli.Args) -> None:
    if args.compare:
        write_comparison(args.out, load_all(args.compare))
        log_info(f"wrote {epath.Path(args.out) / 'index.html'} and comparison.json beside it")
    else:
        results = evaluate(from_config_dict(EvalConfig, args.config), args.model, args.tokenizer, args.out)
        if distributed.is_first():
            for name, value, meaning in report.metrics_table(results):
                print(f"{name:26} {value:>11}  {meaning}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    flags = cli.Flags(__doc__)
    flags.comma_list("compare", (), "output folders of several models, to be compared with the first on one page")
    flags.string("out", None, "folder for results.json and index.html", required=True)
    if not any(argument.lstrip("-").partition("=")[0] == "compare" for argument in argv):
        flags.config()
        flags.string("model", None, "model folder", required=True)
        flags.string("tokenizer", None, "tokenizer folder", required=True)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
