"""Evaluate a model on held-out scenes: results.json and index.html.

lvm evaluate --config=configs/eval_demo.py --model=MODEL --tokenizer=TOKENIZER --out=FOLDER
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lvm.common import cli, files
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.images.sources import ImageSource, open_source
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Pairs, Video
from lvm.data.store.reader import MANIFEST, Store
from lvm.evaluation import likelihood, prompted, summary
from lvm.evaluation.heldout import Heldout
from lvm.evaluation.reconstruction import reconstruction_metrics
from lvm.inference.generator import SamplingParams
from lvm.inference.pretrained import LVM
from lvm.interop.models import check_tokenizer
from tokenizer import Tokenizer

_COUNTED_VIDEOS = 4000  # at most, of the store
_BATCH = 64  # images a call of the tokenizer, prompts a call of the model


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is asked.

    Attributes:
      source: a folder of images, or a config file of a source: the one that training saw, of which the scenes
        that it held out are asked on.
      unseen: says that the source is another one, none of whose images was in training: all are asked on.
      max_scenes: held-out scenes that are read at most.
      num_sentences: of each component of the model's mixture, for the likelihoods.
      num_queries: prompted questions of each task.
      shots: example pairs a question.
      data: sources whose recipes are asked of a model that doesn't tell its own, such as a published one.
      temperature, top_k, top_p: how answers are drawn; temperature 0 takes the most likely code.
      seed: draws the sentences and the questions, and the answers' codes.
    """

    source: str = ""
    unseen: bool = False
    max_scenes: int = 256
    num_sentences: int = 128
    num_queries: int = 128
    shots: int = 2
    data: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_scenes", "num_sentences", "num_queries", "shots"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")
        SamplingParams(self.temperature, self.top_k, self.top_p)  # refuses impossible values by their names


def evaluate(config: EvalConfig, model_folder: str, tokenizer_folder: str, out: str) -> dict[str, Any]:
    """Runs every evaluation that the source's streams allow; returns what `results.json` holds."""
    model, tokenizer = LVM.load(model_folder), Tokenizer.load(tokenizer_folder)
    check_tokenizer(model.record["tokenizer"], model.vocabulary, tokenizer.identity(), tokenizer_folder)
    mixture = _mixture(config, model, model_folder)
    if not config.source:
        raise UserError("config.source: empty; give a folder of images, or a source's config file")
    source = open_source(config.source, tokenizer.preprocess)
    # Equal records and steps are equal weights.
    request = files.as_json(
        {
            "config": to_json(config),
            "model": {"record": model.record, "step": model.step},
            "source": source.describe(),
        }
    )
    results_path = epath.Path(out) / "results.json"
    if results_path.exists() and (epath.Path(out) / "index.html").exists():
        earlier = files.read_json(results_path)
        if earlier.get("request") == request:
            log_info(f"{results_path}: this evaluation is there already")
            return earlier
    epath.Path(out).mkdir(parents=True, exist_ok=True)

    encode = functools.partial(tokenizer.encode, batch_size=_BATCH)
    decode = functools.partial(tokenizer.decode, batch_size=_BATCH)
    _check_source(config, source, model)
    fraction = None if config.unseen else mixture.heldout_fraction
    heldout = Heldout(source, fraction, config.max_scenes, encode)
    log_info(f"{len(heldout.scenes)} held-out scenes of {source.name}")
    results: dict[str, Any] = {"request": request, "heldout_scenes": len(heldout.scenes)}
    results["tokenizer"] = reconstruction_metrics(heldout, decode, tokenizer.config.codebook_size)
    sentences = {
        name: made
        for number, (name, part) in enumerate(mixture.components.items())
        if part.weight > 0
        and _fits(part.recipe.num_grids, model, tokenizer)
        and (made := heldout.sentences(part.recipe, config.num_sentences, config.seed + number)) is not None
    }
    log_info(f"likelihood of {config.num_sentences} sentences each of {', '.join(sentences) or 'nothing'}")
    losses = {name: likelihood.grid_losses(model, made) for name, made in sentences.items()}
    results["likelihood"] = _likelihood(model, mixture, heldout, losses, sentences)
    asked = _ask(config, model, mixture, heldout, decode)
    results["prompted"] = {
        answers.target_stream: answers.scores(heldout.codecs[answers.target_stream]) for answers in asked
    }
    if len(asked) > 1:
        results["task_following"] = prompted.task_following(asked, heldout, model.vocabulary.num_codes)
    log_info("writing the page")
    pictures = summary.make_sections(model, mixture, heldout, decode, asked, sentences)
    summary.write_report(out, results, pictures, model_folder, tokenizer_folder)
    return results


def _mixture(config: EvalConfig, model: LVM, folder: str) -> MixtureConfig:
    """What the model learned; of a model that doesn't tell, what the configuration asks."""
    told = model.record.get("config", {}).get("data")
    if told is not None:
        return from_config_dict(MixtureConfig, told, f"{folder}: config.data")
    if not config.data.components:
        raise UserError(
            f"config.data.components: empty, and {folder} doesn't tell what it was trained on; name sources with the "
            "recipes to ask"
        )
    return config.data


def _check_source(config: EvalConfig, source: ImageSource, model: LVM) -> None:
    """Refuses what would count images of training as held out, or a source that isn't what it is said to be."""
    described = files.as_json(source.describe())

    def is_same(seen: Mapping[str, Any]) -> bool:
        same_seed = seen["kind"] == described["kind"] == "generated" and seen["seed"] == described["seed"]
        return seen == described or same_seed

    was_seen = any(is_same(seen) for seen in model.record["sources"])
    if was_seen and config.unseen:
        raise UserError(f"config.unseen: {config.source} is what the model was trained on")
    if not was_seen and not config.unseen:
        raise UserError(
            f"config.source: {config.source} is not what the model was trained on, or has changed since; if none "
            "of its images was in training, set config.unseen=true"
        )


def _fits(num_grids: int, model: LVM, tokenizer: Tokenizer) -> bool:
    fits = num_grids <= model.max_images(tokenizer.codes_per_image)
    if not fits:
        log_info(
            f"no likelihood of sentences of {num_grids} images: longer than the context of {model.config.context}"
        )
    return fits


def _likelihood(
    model: LVM,
    mixture: MixtureConfig,
    heldout: Heldout,
    losses: dict[str, np.ndarray],
    sentences: dict[str, np.ndarray],
) -> dict[str, Any]:
    if not losses:
        return {}
    num_codes = model.vocabulary.num_codes
    weights = {name: part.weight for name, part in mixture.components.items()}
    figures: dict[str, Any] = {"mixture": likelihood.mixture_metrics(losses, sentences, weights, num_codes)}
    figures["perplexity_by_image"] = {name: likelihood.perplexity_by_image(x) for name, x in losses.items()}
    for name, part in mixture.components.items():
        if isinstance(part.recipe, Video) and name in losses and losses[name].shape[1] > 2:
            videos = _videos(part, mixture.store, heldout, model.record["stores"])
            figures["video"] = likelihood.video_metrics(
                losses[name], videos, min(part.recipe.strides), num_codes
            )
    return figures


def _videos(
    part: ComponentConfig, default_store: str, heldout: Heldout, stores: list[str]
) -> list[np.ndarray]:
    """Codes int [T, N] of the videos that the conditional entropy is counted on.

    Those of the store that the model was trained from, if it is there: an entropy of pairs of codes counted on
    few of them comes out far too low. Else the held-out ones alone.
    """
    recipe, path = part.recipe, epath.Path(part.store or default_store)
    assert isinstance(recipe, Video)
    if (path / MANIFEST).exists() and (store := Store(path)).identity() in stores:
        return store.videos(recipe.stream, recipe.min_frames, _COUNTED_VIDEOS)
    log_info(
        f"{path}: not the store that the model was trained from; the entropy is counted on held-out videos"
    )
    scenes = heldout.with_streams([recipe.stream], recipe.min_frames)
    return [scene.codes[:, scene.info.streams.index(recipe.stream)] for scene in scenes]


def _ask(config: EvalConfig, model: LVM, mixture: MixtureConfig, heldout: Heldout, decode: Any) -> list:
    """Every pairs task of the mixture, on the same queries where the scenes have all streams."""
    tasks = [p.recipe for p in mixture.components.values() if isinstance(p.recipe, Pairs) and p.weight > 0]
    tasks = [task for task in tasks if heldout.with_streams(task.streams)]
    streams = sorted({stream for task in tasks for stream in task.streams})
    queries = prompted.make_queries(
        heldout.with_streams(streams), config.num_queries, config.shots, config.seed
    )
    if not queries:
        return []

    def answer(prompts: np.ndarray, num_images: int) -> np.ndarray:
        parts = [
            model.generate(
                prompts[start : start + _BATCH],
                num_images,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                seed=[config.seed + start + i for i in range(len(prompts[start : start + _BATCH]))],
            )
            for start in range(0, len(prompts), _BATCH)
        ]
        return np.concatenate(parts)

    asked = []
    for task in tasks:
        log_info(f"{task.target} by {config.shots} examples, {len(queries)} queries")
        asked.append(prompted.answer_queries(queries, task.input, task.target, answer, decode))
    return asked


def _run(args: cli.Args) -> None:
    config = from_config_dict(EvalConfig, args.config)
    evaluate(config, args.model, args.tokenizer, args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string("model", None, "a model's folder", required=True)
    flags.string("tokenizer", None, "its tokenizer's folder", required=True)
    flags.string("out", None, "where results.json and index.html go", required=True)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
