"""Evaluates a model on held-out scenes and writes `results.json` and `index.html`.

python -m lvm.evaluate --config=configs/eval_demo.py --model=W --tokenizer=W2 --out=DIR
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags

from lvm import cli, files
from lvm.config import from_config_dict, to_json
from lvm.console import say
from lvm.data.mixture import MixtureConfig
from lvm.data.recipes import Pairs, Video
from lvm.data.sources import open_source
from lvm.errors import UserError
from lvm.evaluation import likelihood, prompted, summary
from lvm.evaluation.heldout import Heldout
from lvm.evaluation.reconstruction import reconstruction_figures
from lvm.pretrained import LVM
from tokenizer import Tokenizer

_BATCH = 64  # images a call of the tokenizer, prompts a call of the model


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is asked.

    Attributes:
      source: a folder of images, or a config file of a source: the one that training saw.
      max_scenes: held-out scenes that are read at most.
      sentences: of each source of the model's mixture, for the likelihoods.
      queries: prompted questions of each task.
      shots: example pairs a question.
      temperature, top_k, top_p: how answers are drawn; temperature 0 takes the most likely code.
      seed: draws the sentences and the questions, and the answers' codes.
    """

    source: str = ""
    max_scenes: int = 256
    sentences: int = 128
    queries: int = 128
    shots: int = 2
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_scenes", "sentences", "queries", "shots"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")


def evaluate(config: EvalConfig, model_folder: str, tokenizer_folder: str, out: str) -> dict[str, Any]:
    """Runs every evaluation that the source's streams allow; returns what `results.json` holds."""
    model, tokenizer = LVM.load(model_folder), Tokenizer.load(tokenizer_folder)
    if tokenizer.identity()["weights"] != model.record["tokenizer"]["weights"]:
        raise UserError(f"{tokenizer_folder}: not the tokenizer that {model_folder} was trained with")
    mixture = from_config_dict(MixtureConfig, model.record["config"]["data"], f"{model_folder}: config.data")
    request = files.as_json(
        {"config": to_json(config), "model_step": model.step, "stores": model.record["stores"]}
    )
    results_path = epath.Path(out) / "results.json"
    if results_path.exists() and files.read_json(results_path).get("request") == request:
        say(f"{results_path}: this evaluation is there already")
        return files.read_json(results_path)
    if not config.source:
        raise UserError("config.source: empty; give the folder or config file that training saw")

    encode = functools.partial(tokenizer.encode, batch_size=_BATCH)
    decode = functools.partial(tokenizer.decode, batch_size=_BATCH)
    source = open_source(config.source, tokenizer.preprocess)
    heldout = Heldout(source, mixture.heldout_fraction, config.max_scenes, encode)
    say(f"{len(heldout.scenes)} held-out scenes of {source.name}")
    results: dict[str, Any] = {"request": request, "heldout_scenes": len(heldout.scenes)}
    results["tokenizer"] = reconstruction_figures(heldout, decode, tokenizer.config.codebook_size)
    sentences = {
        name: made
        for number, (name, part) in enumerate(mixture.sources.items())
        if part.weight > 0
        and (made := heldout.sentences(part.recipe, config.sentences, config.seed + number)) is not None
    }
    say(f"likelihood of {config.sentences} sentences each of {', '.join(sentences) or 'nothing'}")
    losses = {name: likelihood.grid_losses(model, made) for name, made in sentences.items()}
    results["likelihood"] = _likelihood(mixture, heldout, losses, sentences, model.vocabulary.num_codes)
    asked = _ask(config, model, mixture, heldout, decode)
    results["prompted"] = {
        answers.target: answers.figures(heldout.codecs[answers.target]) for answers in asked
    }
    if len(asked) > 1:
        results["task_following"] = prompted.task_following(asked, heldout, model.vocabulary.num_codes)
    say("writing the page")
    pictures = summary.pictures(model, mixture, heldout, decode, asked, sentences)
    summary.write(out, results, pictures, model_folder, tokenizer_folder)
    return results


def _likelihood(
    mixture: MixtureConfig,
    heldout: Heldout,
    losses: dict[str, np.ndarray],
    sentences: dict[str, np.ndarray],
    num_codes: int,
) -> dict[str, Any]:
    if not losses:
        return {}
    weights = {name: part.weight for name, part in mixture.sources.items()}
    figures: dict[str, Any] = {"mixture": likelihood.mixture_loss(losses, sentences, weights, num_codes)}
    figures["perplexity_by_image"] = {name: likelihood.perplexity_by_image(x) for name, x in losses.items()}
    for name, part in mixture.sources.items():
        if isinstance(part.recipe, Video) and name in losses and losses[name].shape[1] > 2:
            stream, frames = part.recipe.stream, part.recipe.min_frames
            videos = [
                scene.codes[:, scene.info.streams.index(stream)]
                for scene in heldout.with_streams([stream], frames)
            ]
            figures["video"] = likelihood.video_figures(losses[name], videos, num_codes)
    return figures


def _ask(config: EvalConfig, model: LVM, mixture: MixtureConfig, heldout: Heldout, decode: Any) -> list:
    """Every pairs task of the mixture, on the same queries where the scenes have all streams."""
    tasks = [p.recipe for p in mixture.sources.values() if isinstance(p.recipe, Pairs) and p.weight > 0]
    tasks = [task for task in tasks if heldout.with_streams(task.streams)]
    streams = sorted({stream for task in tasks for stream in task.streams})
    queries = prompted.make_queries(heldout.with_streams(streams), config.queries, config.shots, config.seed)
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
        say(f"{task.target} by {config.shots} examples, {len(queries)} queries")
        asked.append(prompted.ask(queries, task.source, task.target, answer, decode))
    return asked


def main() -> None:
    """The command."""
    config = from_config_dict(EvalConfig, _CONFIG.value)
    evaluate(config, _MODEL.value, _TOKENIZER.value, _OUT.value)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", help_string="a file of configs/", lock_config=True)
    _MODEL = flags.DEFINE_string("model", None, "a model's folder", required=True)
    _TOKENIZER = flags.DEFINE_string("tokenizer", None, "its tokenizer's folder", required=True)
    _OUT = flags.DEFINE_string("out", None, "where results.json and index.html go", required=True)
    flags.mark_flag_as_required("config")
    cli.run(main)
