"""Evaluate a model on held-out scenes: results.json and index.html.

lvm evaluate --config=configs/eval_demo.py --model=MODEL --tokenizer=TOKENIZER --out=FOLDER
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lvm.common import cli, files
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_info, log_warning
from lvm.data.images.sources import ImageSource, open_source
from lvm.data.mixture.mixture import MixtureConfig
from lvm.data.mixture.recipes import Pairs, Video
from lvm.data.store.reader import MANIFEST, Store
from lvm.evaluation import likelihood, prompted, report
from lvm.evaluation.config import EvalConfig
from lvm.evaluation.heldout import Heldout, reconstruction_metrics
from lvm.inference.pretrained import LVM
from lvm.interop.models import check_tokenizer
from tokenizer import Tokenizer

_MAX_STORE_VIDEOS = 4000  # for the conditional entropy
_BATCH = 64  # images per call of the tokenizer, prompts per call of the model


def evaluate(config: EvalConfig, model_folder: str, tokenizer_folder: str, out: str) -> dict[str, Any]:
    """Runs every evaluation that the image source's streams allow; returns the content of `results.json`."""
    model, tokenizer = LVM.load(model_folder), Tokenizer.load(tokenizer_folder)
    check_tokenizer(model.record["tokenizer"], model.vocabulary, tokenizer.identity(), tokenizer_folder)
    mixture = _mixture(config, model, model_folder)
    if not config.source:
        raise UserError("config.source is empty; give a folder of images or an image source's config file")
    source = open_source(config.source, tokenizer.preprocess)
    weights = {"record": model.record, "step": model.step}  # equal for equal weights
    request = files.as_json({"config": to_json(config), "model": weights, "source": source.describe()})
    results_path = epath.Path(out) / "results.json"
    earlier = files.read_side_file(results_path)
    if earlier.get("request") == request and (epath.Path(out) / "index.html").exists():
        log_info(f"{results_path} is up to date")
        return earlier
    epath.Path(out).mkdir(parents=True, exist_ok=True)
    _check_source(config, source, model)

    encode = functools.partial(tokenizer.encode, batch_size=_BATCH)
    decode = functools.partial(tokenizer.decode, batch_size=_BATCH)
    heldout = Heldout(source, None if config.unseen else mixture.heldout_fraction, config.max_scenes, encode)
    log_info(f"{len(heldout.scenes)} held-out scenes of {source.name}")
    results: dict[str, Any] = {"request": request, "heldout_scenes": len(heldout.scenes)}
    results["tokenizer"] = reconstruction_metrics(heldout, decode, tokenizer.config.codebook_size)
    sentences = _sentences(config, mixture, heldout, model.max_images(tokenizer.codes_per_image))
    results["likelihood"] = _likelihood(model, mixture, heldout, sentences)
    tasks = _answer_tasks(config, model, mixture, heldout, decode)
    results["prompted"] = {task.target_stream: task.scores(heldout.codecs[task.target_stream]) for task in tasks}
    if len(tasks) > 1:
        results["task_following"] = prompted.task_following(tasks, heldout, model.vocabulary.num_codes)
    sections = report.make_sections(model, mixture, heldout, decode, tasks, sentences)
    report.write_report(out, results, sections, model_folder, tokenizer_folder)
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


def _check_source(config: EvalConfig, source: ImageSource, model: LVM) -> None:
    """Checks `unseen` against the model's record, so that no training image counts as held out."""
    described = files.as_json(source.describe())

    def is_same(other: Mapping[str, Any]) -> bool:
        same_seed = other["kind"] == described["kind"] == "generated" and other["seed"] == described["seed"]
        return other == described or same_seed

    was_seen = any(is_same(other) for other in model.record["sources"])
    if was_seen and config.unseen:
        raise UserError(f"config.unseen=true, but config.source={config.source} is what the model was trained on")
    if not was_seen and not config.unseen:
        raise UserError(
            f"config.source={config.source} is not what the model was trained on, or has changed since; "
            "if training saw none of its images, set config.unseen=true"
        )


def _sentences(config: EvalConfig, mixture: MixtureConfig, heldout: Heldout, max_images: int) -> dict[str, np.ndarray]:
    """Sentences of each component that fit the context and that the held-out scenes allow."""
    sentences = {}
    for index, (name, component) in enumerate(mixture.components.items()):
        recipe = component.recipe
        if component.weight > 0 and recipe.num_grids > max_images:
            log_warning(f"no likelihood of {name}: its sentences of {recipe.num_grids} images exceed the context")
        elif component.weight > 0:
            sampled = heldout.sentences(recipe, config.num_sentences, config.seed + index)
            if sampled is not None:
                sentences[name] = sampled
    log_info(f"likelihood of {config.num_sentences} sentences each of {', '.join(sentences) or 'nothing'}")
    return sentences


def _likelihood(
    model: LVM, mixture: MixtureConfig, heldout: Heldout, sentences: dict[str, np.ndarray]
) -> dict[str, Any]:
    if not sentences:
        return {}
    losses = {name: likelihood.grid_losses(model, batch) for name, batch in sentences.items()}
    num_codes = model.vocabulary.num_codes
    weights = {name: mixture.code_weight(component) for name, component in mixture.components.items()}
    results: dict[str, Any] = {
        "mixture": likelihood.mixture_metrics(losses, sentences, weights, num_codes),
        "perplexity_by_image": {name: likelihood.perplexity_by_image(x) for name, x in losses.items()},
    }
    for name, component in mixture.components.items():
        recipe = component.recipe
        if isinstance(recipe, Video) and name in losses and losses[name].shape[1] > 2:
            videos = _videos(recipe, mixture.stores_of(component), heldout, model.record)
            results["video"] = likelihood.video_metrics(losses[name], videos, min(recipe.strides), num_codes)
    return results


def _videos(recipe: Video, paths: Sequence[str], heldout: Heldout, record: Mapping[str, Any]) -> list[np.ndarray]:
    """Codes int [T, N] of the videos to estimate the conditional entropy on.

    Videos of the training stores if they are there, else the held-out ones: few transitions bias the estimate low.
    """
    videos: list[np.ndarray] = []
    for path in paths:
        # Relative ones begin in the folder that training was started in; a store may have been moved with its project.
        trained = os.path.join(record.get("folder", ""), path)
        existing = next((p for p in (path, trained) if (epath.Path(p) / MANIFEST).exists()), None)
        if existing and (store := Store(existing)).identity() in record["stores"]:
            videos += store.videos(recipe.stream, recipe.min_frames, _MAX_STORE_VIDEOS - len(videos))
    if videos:
        return videos
    log_warning(
        f"{', '.join(paths)}: not the training store; the conditional entropy is estimated on held-out videos alone"
    )
    scenes = heldout.with_streams([recipe.stream], recipe.min_frames)
    return [scene.codes[:, scene.info.streams.index(recipe.stream)] for scene in scenes]


def _answer_tasks(
    config: EvalConfig, model: LVM, mixture: MixtureConfig, heldout: Heldout, decode: prompted.DecodeFn
) -> list[prompted.Answers]:
    """Answers for every pairs recipe of the mixture, to the same queries if the scenes have all streams."""
    recipes = [c.recipe for c in mixture.components.values() if isinstance(c.recipe, Pairs) and c.weight > 0]
    recipes = [recipe for recipe in recipes if heldout.with_streams(recipe.streams)]
    scenes = heldout.with_streams(sorted({stream for recipe in recipes for stream in recipe.streams}))
    queries = prompted.make_queries(scenes, config.num_queries, config.shots, config.seed)
    if not queries:
        return []

    def answer(prompts: np.ndarray, num_images: int) -> np.ndarray:
        answers = []
        for start in range(0, len(prompts), _BATCH):
            batch = prompts[start : start + _BATCH]
            seeds = [config.seed + start + i for i in range(len(batch))]
            answers.append(model.generate(batch, num_images, 1, config.temperature, config.top_k, config.top_p, seeds))
        return np.concatenate(answers)

    tasks = []
    for recipe in recipes:
        log_info(f"{recipe.target} by {config.shots} examples, {len(queries)} queries")
        tasks.append(prompted.answer_queries(queries, recipe.input, recipe.target, answer, decode))
    return tasks


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
