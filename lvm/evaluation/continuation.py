"""Continuations of a sequence of images of one scene: the images after a prompt, against the true ones."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Integer, UInt8

from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative, check_positive
from lvm.data.mixture.recipes import Recipe
from lvm.evaluation.evaluator import Context, Evaluator, NotApplicableError, Result
from lvm.evaluation.figures import Figure, Metric, Picture, Plot, estimate, format_count
from lvm.evaluation.image_metrics import Compare, image_metrics
from lvm.evaluation.prompted import GREEDY, generate
from lvm.inference.contact_sheet import Cell, answer_row, render_sheet
from lvm.inference.sampling import SamplingParams

_MAX_SEQUENCES = 4  # in the picture
Sequences = UInt8[np.ndarray, "B T H W 3"]


@dataclasses.dataclass(frozen=True)
class Continuation(Evaluator):
    """Base of evaluations of sequences: images of held-out scenes as the mixture's recipe orders them, continued.

    Attributes:
      recipe_type: of the mixture's components that are evaluated.
      noun: of one image.
      component: of the mixture; "" takes the first with such a recipe.
      prompt: images that are given; 0 is half of the recipe's.
      num_queries: sequences, over all held-out scenes in turn, each from a random image on.
      sampling: of answers; greedy by default.
    """

    recipe_type: ClassVar[type[Recipe]]
    noun: ClassVar[str]

    component: str = ""
    prompt: int = 0
    num_queries: int = 64
    sampling: SamplingParams = GREEDY

    def __post_init__(self) -> None:
        super().__post_init__()
        check_non_negative(self, "prompt")
        check_positive(self, "num_queries")

    @abc.abstractmethod
    def fixed(self, recipe: Recipe) -> Recipe:
        """The recipe with a single spacing of images, so that a figure is of one difficulty; its start is random."""

    def run(self, context: Context) -> Result:
        recipe = self._recipe(context)
        truth, codes, groups = self._sequences(context, recipe)
        length = truth.shape[1]
        prompt = self.prompt or max(1, length // 2)
        _, answers = generate(context, codes[:, :prompt], length - prompt, self.sampling, f"{self.noun}s")
        decoded = context.tokenizer.decode(codes.reshape(-1, codes.shape[-1])).reshape(truth.shape)
        mean = np.rint(truth[:, :prompt].mean(1, keepdims=True)).astype(np.uint8)
        candidates = {
            "model": answers,
            f"last {self.noun}": np.repeat(truth[:, prompt - 1 : prompt], length - prompt, axis=1),
            "mean of the prompt": np.repeat(mean, length - prompt, axis=1),
            "ceiling": decoded[:, prompt:],
        }
        figures, pictures = [], []
        for metric, compare in image_metrics(context.lpips):
            scores = {name: _by_image(compare, images, truth[:, prompt:]) for name, images in candidates.items()}
            figures.append(self._figure(metric, scores, prompt, groups))
            pictures.append(self._plot(metric, scores, prompt, groups))
        return figures, [*pictures, self._sheet(decoded, answers, prompt, groups)]

    def _recipe(self, context: Context) -> Recipe:
        components = context.mixture.components
        if self.component and self.component not in components:
            raise UserError(f"component={self.component!r} must be one of {', '.join(components)}")
        names = [self.component] if self.component else list(components)
        used = [components[name].recipe for name in names if components[name].weight > 0]
        recipe = next((recipe for recipe in used if isinstance(recipe, self.recipe_type)), None)
        if recipe is None:
            raise NotApplicableError(f"no component of the mixture has a recipe of kind {self.recipe_type.kind!r}")
        if not self.prompt < recipe.num_grids:
            raise UserError(f"prompt={self.prompt} must be below the {recipe.num_grids} {self.noun}s of the recipe")
        if recipe.num_grids < 2:
            raise NotApplicableError(f"the recipe has one {self.noun}")
        if recipe.num_grids > context.images_in_context:
            raise NotApplicableError(f"{recipe.num_grids} {self.noun}s exceed the context")
        return self.fixed(recipe)

    def _sequences(
        self, context: Context, recipe: Recipe
    ) -> tuple[Sequences, Integer[np.ndarray, "B T N"], Sequence[str]]:
        """True images of the queries, their codes and their originals."""
        (stream,) = recipe.streams
        scenes = context.heldout.with_streams([stream], recipe.min_frames)
        if not scenes:
            raise NotApplicableError(f"no held-out scene has {recipe.min_frames} frames of {stream}")
        images, codes, groups = [], [], []
        context.episodes = []
        for index in range(self.num_queries):
            scene, rng = scenes[index % len(scenes)], np.random.default_rng([context.seed, index])
            frames = [grid.frame for grid in recipe.sample_one([len(scene.images)], rng)]
            column = scene.info.streams.index(stream)
            images.append(scene.images[frames, column])
            codes.append(scene.codes[frames, column])
            groups.append(scene.info.group)
            context.episodes.append([scene.info.key, frames])
        return np.stack(images), np.stack(codes), groups

    def _figure(
        self, metric: Metric, scores: Mapping[str, Float[np.ndarray, "B T"]], prompt: int, groups: Sequence[str]
    ) -> Figure:
        means = {name: estimate(values.mean(1), groups=groups) for name, values in scores.items()}
        model, ceiling = means.pop("model"), means.pop("ceiling")
        count, length = format_count("sequences", groups), scores["model"].shape[1]
        text = f"{metric.text} of {length} {self.noun}s after {prompt}, mean over {self.noun}s; {count}"
        return Figure(metric.name, model, text, metric.unit, metric.higher_is_better, means, ceiling)

    def _plot(
        self, metric: Metric, scores: Mapping[str, Float[np.ndarray, "B T"]], prompt: int, groups: Sequence[str]
    ) -> Picture:
        series: dict[str, Sequence[tuple[float, ...]]] = {}
        for name, values in scores.items():
            estimates = [estimate(values[:, i], groups=groups) for i in range(values.shape[1])]
            series[name] = [(float(prompt + i + 1), x.value, *(x.interval or ())) for i, x in enumerate(estimates)]
        label = metric.name.upper() + (f" in {metric.unit}" if metric.unit else "")
        title = f"{self.kind.capitalize()}, {metric.name.upper()} by {self.noun}"
        text = f"{metric.text} of each {self.noun} after the prompt; bands are 95 % intervals."
        return Picture(title, text, Plot(series, self.noun, label))

    def _sheet(
        self, truth: Sequences, answers: UInt8[np.ndarray, "B A H W 3"], prompt: int, groups: Sequence[str]
    ) -> Picture:
        rows: list[Sequence[Cell | None]] = []
        firsts = np.sort(np.unique(groups, return_index=True)[1])  # of different originals
        for i in firsts[:: max(1, len(firsts) // _MAX_SEQUENCES)][:_MAX_SEQUENCES]:
            rows.append([Cell(image, f"{self.noun} {t + 1}") for t, image in enumerate(truth[i])])
            rows.append(answer_row(prompt, answers[i]))
        text = (
            f"The first {prompt} {self.noun}s are the prompt. Above: the true {self.noun}s, through the tokenizer. "
            "Below, framed: the model's continuation."
        )
        return Picture(f"{self.kind.capitalize()}, continued", text, render_sheet(rows))


def _by_image(compare: Compare, images: Sequences, truth: Sequences) -> Float[np.ndarray, "B T"]:
    """A metric of each image."""
    B, T = images.shape[:2]
    return compare(*(x.reshape(B * T, *x.shape[2:]) for x in (images, truth))).reshape(B, T)
