"""Evaluate a model on held-out scenes: results.json and index.html.

lvm evaluate --config=configs/eval_demo.py --model=MODEL --tokenizer=TOKENIZER --out=FOLDER
"""

from collections.abc import Sequence
from typing import Any

from etils import epath

from lvm.common import cli, distributed, files
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.images.sources import open_source
from lvm.data.mixture.mixture import MixtureConfig
from lvm.evaluation import report
from lvm.evaluation.config import EvalConfig
from lvm.evaluation.evaluator import Context, Tokenizer
from lvm.evaluation.heldout import check_source
from lvm.evaluation.run import run_evaluations
from lvm.hardware.sharding import make_mesh
from lvm.inference.pretrained import LVM
from lvm.interop.models import check_tokenizer
from tokenizer import Tokenizer as LoadedTokenizer


def evaluate(config: EvalConfig, model_folder: str, tokenizer_folder: str, out: str) -> dict[str, Any]:
    """Runs the evaluations that `out` has no results of yet; returns the content of `results.json`."""
    distributed.join(config.distributed)
    mesh = make_mesh(config.mesh)
    model = LVM.load(model_folder, mesh=mesh if mesh.size > 1 else None)
    loaded = LoadedTokenizer.load(tokenizer_folder)
    check_tokenizer(model.record["tokenizer"], model.vocabulary, loaded.identity(), tokenizer_folder)
    tokenizer = Tokenizer.of(loaded, config.batch_size)
    mixture = _mixture(config, model, model_folder)
    source = open_source(config.source, loaded.preprocess) if config.source else None
    if source is not None:
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
    )
    settings = to_json(config)
    request = files.as_json(
        {
            # Figures don't depend on the batch size and the devices.
            "config": {key: settings[key] for key in ("unseen", "max_scenes", "seed", "data")},
            "model": {"record": model.record, "step": model.step},
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


def _run(args: cli.Args) -> None:
    evaluate(from_config_dict(EvalConfig, args.config), args.model, args.tokenizer, args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string("model", None, "model folder", required=True)
    flags.string("tokenizer", None, "tokenizer folder", required=True)
    flags.string("out", None, "folder for results.json and index.html", required=True)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
