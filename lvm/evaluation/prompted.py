"""In-context tasks: pairs of an image and its annotation, then a query image whose annotation is the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Integer, Shaped, UInt8

from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.common.validation import check_positive, check_tuples
from lvm.data.streams.codecs import Codec
from lvm.evaluation import baselines
from lvm.evaluation.episodes import Images, Query, describe_shortage, first_examples, make_queries
from lvm.evaluation.evaluator import Context, Evaluator, NotApplicableError, Result
from lvm.evaluation.figures import Estimate, Figure, Metric, Picture, Plot, estimate, format_count
from lvm.evaluation.heldout import HeldoutScene
from lvm.evaluation.image_metrics import image_metrics
from lvm.inference.contact_sheet import Cell, render_sheet
from lvm.inference.sampling import SamplingParams

Statistics = Mapping[str, Shaped[np.ndarray, "B ..."]]  # metric → a statistic of each query, NaN for none
GREEDY = SamplingParams(0.0)
_MAX_QUERIES = 5  # in a picture


@dataclasses.dataclass(frozen=True)
class PromptedTask(Evaluator):
    """Base of prompted tasks: how well a query is answered after example pairs.

    Attributes:
      codec_type: of the target stream.
      also_plotted: metrics besides the first that are plotted by number of examples.
      image_metrics: names of further metrics, of the answer's pixels.
      input, target: the streams of images and their annotations.
      shots: example pairs of a query.
      num_queries: queries, over all held-out scenes in turn; equal for tasks whose scenes are.
      same_class: examples are scenes of the query's class.
      same_original: examples may be other scenes of the query's original, as in a source of a single video.
      sweep: further numbers of example pairs, whose figures are plotted. Fewer examples are the first of more.
      sampling: of answers; greedy by default.
    """

    codec_type: ClassVar[type] = Codec
    also_plotted: ClassVar[tuple[str, ...]] = ()
    image_metrics: ClassVar[tuple[str, ...]] = ("psnr",)

    input: str = "rgb"
    target: str = ""
    shots: int = 2
    num_queries: int = 128
    same_class: bool = False
    same_original: bool = False
    sweep: tuple[int, ...] = ()
    sampling: SamplingParams = GREEDY

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "shots", "num_queries")
        check_tuples(self, "sweep")
        if any(shots < 1 for shots in self.sweep):
            raise UserError(f"sweep={self.sweep} must be positive numbers of example pairs")
        if self.input == self.target or not self.target:
            raise UserError(f"target={self.target!r} must be a stream other than input={self.input!r}")

    @property
    def title(self) -> str:
        """The name of the target on the page."""
        return self.target

    def metrics(self, codec: Codec) -> Sequence[Metric]:
        """The metrics of `score`, in the order of the table."""
        return []

    def score(self, codec: Codec, images: Images, truth: Images, queries: Sequence[Query]) -> Statistics:
        """A statistic of each metric and query, of images parsed by the codec of the target stream."""
        return {}

    def candidates(self, context: Context, queries: Sequence[Query], codec: Codec) -> dict[str, Images]:
        """Baselines: images given as answers without a model."""
        answers = {
            "copied example": baselines.copied_example(queries, self.target),
            "copied query": baselines.copied_query(queries, self.input),
            "mean image": baselines.mean_image(queries, self.target, self.same_original),
        }
        neighbors = self.neighbors(context, queries)
        return answers if neighbors is None else answers | {"nearest training neighbor": neighbors}

    def neighbors(self, context: Context, queries: Sequence[Query]) -> Images | None:
        """The answers of the nearest training frames, None without a training store."""
        return baselines.nearest_neighbor(context, queries, self.input, self.target)

    def chance(self, codec: Codec, images: Images, truth: Images) -> dict[str, dict[str, Estimate]]:
        """Chance levels: metric → name → estimate, of the model's own answers."""
        return {}

    def is_usable(self, scene: HeldoutScene, codec: Codec) -> bool:
        """True if a scene with both streams may be a query or an example."""
        return True

    def run(self, context: Context) -> Result:
        queries, codec = self.queries(context), self.codec(context)
        context.episodes = [query.to_json() for query in queries]
        by_shots = {shots: [first_examples(query, shots) for query in queries] for shots in {self.shots, *self.sweep}}
        asked = by_shots[self.shots]
        truth = np.stack([query.scene.image(query.frame, self.target) for query in asked])
        images = self.answer(context, asked)
        ceiling = context.tokenizer.decode(np.stack([query.scene.grid(query.frame, self.target) for query in asked]))

        groups = [query.group for query in asked]
        of_pixels = image_metrics(context.lpips, self.image_metrics)
        metrics = [*self.metrics(codec), *(metric for metric, _ in of_pixels)]

        def estimates(answers: Images) -> dict[str, Estimate]:
            scores = {metric.name: compare(answers, truth) for metric, compare in of_pixels}
            scores |= self.score(codec, answers, truth, asked)
            return {metric.name: estimate(scores[metric.name], metric.aggregate, groups) for metric in metrics}

        scored = {"model": estimates(images), "ceiling": estimates(ceiling)}
        others = {name: estimates(x) for name, x in self.candidates(context, asked, codec).items()}
        chance = self.chance(codec, images, truth)
        figures = [
            Figure(
                metric.name,
                scored["model"][metric.name],
                f"{metric.text}; {format_count('queries', groups)}, {self.shots} example pairs",
                metric.unit,
                metric.higher_is_better,
                {name: scores[metric.name] for name, scores in others.items()} | chance.get(metric.name, {}),
                scored["ceiling"][metric.name],
                metric.published,
            )
            for metric in metrics
        ]
        pictures = [self._picture(asked, images, truth)]
        if self.sweep:
            answers = {n: images if n == self.shots else self.answer(context, q) for n, q in by_shots.items()}
            plotted = [metric for metric in metrics if metric is metrics[0] or metric.name in self.also_plotted]
            pictures.append(self._sweep_plot({shots: estimates(answers[shots]) for shots in sorted(answers)}, plotted))
        return figures, pictures

    def streams(self, context: Context) -> Sequence[str]:
        """The streams that a scene must have."""
        return (self.input, self.target)

    def codec(self, context: Context) -> Codec:
        """The codec that rendered the target stream. Raises NotApplicableError if it is none of `codec_type`."""
        codec = context.heldout.codecs[self.target]
        if not isinstance(codec, self.codec_type):
            raise NotApplicableError(f"the stream {self.target} is of kind {codec.kind!r}")
        return codec

    def queries(self, context: Context) -> list[Query]:
        """The queries, with examples for the longest of all prompts.

        Raises:
          NotApplicableError: too few held-out scenes with both streams.
          UserError: the prompt doesn't fit the context.
        """
        shots = max(self.shots, *self.sweep, 1)
        if 2 * shots + 2 > context.images_in_context:
            raise UserError(
                f"{shots} example pairs, a query and its answer are {2 * shots + 2} images; the context holds "
                f"{context.images_in_context}: use fewer shots"
            )
        streams = self.streams(context)
        both = context.heldout.with_streams(streams)
        if not both:
            raise NotApplicableError(f"no held-out scene has the streams {' and '.join(streams)}")
        codec = self.codec(context)
        scenes = [scene for scene in both if self.is_usable(scene, codec)]
        if self.same_class and not any(scene.info.class_name for scene in scenes):
            raise NotApplicableError("same_class=True, but the scenes have no classes; set same_class=false")
        queries = make_queries(scenes, self.num_queries, shots, context.seed, self.same_class, self.same_original)
        if not queries:
            raise NotApplicableError(describe_shortage(scenes, shots, self.same_class, self.same_original))
        return queries

    def answer(self, context: Context, queries: Sequence[Query]) -> Images:
        """The model's answers."""
        return ask(context, queries, self.input, self.target, self.sampling)[1]

    def pictured(self, queries: Sequence[Query]) -> Sequence[int]:
        """Indices of the queries on the contact sheet, which shows the first five of these."""
        return range(0, len(queries), max(1, len(queries) // _MAX_QUERIES))

    def _picture(self, queries: Sequence[Query], images: Images, truth: Images) -> Picture:
        rows = []
        for index in self.pictured(queries)[:_MAX_QUERIES]:
            query, shown = queries[index], {self.input: self.input, self.target: queries[index].shown or self.target}
            rows.append(
                [
                    *(Cell(scene.image(frame, s), shown[s]) for scene, frame in query.examples for s in shown),
                    Cell(query.scene.image(query.frame, self.input), "query"),
                    Cell(images[index], "answer", True),
                    Cell(truth[index], "truth"),
                ]
            )
        text = f"{len(queries[0].examples)} example pairs and a query are the prompt; nothing names the task."
        title = f"{self.title.capitalize()}, by example".replace("_", " ")
        return Picture(title, text, render_sheet(rows))

    def _sweep_plot(self, by_shots: Mapping[int, Mapping[str, Estimate]], metrics: Sequence[Metric]) -> Picture:
        series = {
            metric.name: [
                (float(shots), scores[metric.name].value, *(scores[metric.name].interval or ()))
                for shots, scores in by_shots.items()
            ]
            for metric in metrics
        }
        title = f"{self.title.capitalize()}, by number of examples".replace("_", " ")
        text = f"{'; '.join(metric.text for metric in metrics)}."
        return Picture(title, text, Plot(series, "example pairs", ", ".join(series)))


def ask(
    context: Context, queries: Sequence[Query], source: str, target: str, sampling: SamplingParams
) -> tuple[Integer[np.ndarray, "B N"], Images]:
    """Answers of the model as codes and images; equal questions are asked once."""
    key = (source, target, sampling, str([query.to_json() for query in queries]))
    if key not in context.cache:
        shown = sorted({query.shown or target for query in queries})
        annotation = target if shown == [target] else f"{len(shown)} annotations"
        log_info(f"{annotation} by {len(queries[0].examples)} examples, {len(queries)} queries")
        prompts = np.stack([query.prompt(source, target) for query in queries])  # [B, K, N]
        codes, images = generate(context, prompts, 1, sampling, f"answers of {annotation}")
        context.cache[key] = codes[:, 0], images[:, 0]
    return context.cache[key]


def generate(
    context: Context, prompts: Integer[np.ndarray, "B K N"], num_images: int, sampling: SamplingParams, unit: str
) -> tuple[Integer[np.ndarray, "B A N"], UInt8[np.ndarray, "B A H W 3"]]:
    """Generates `num_images` after each prompt, prompt i with the seed `context.seed` + i; returns codes and images."""
    answers = []
    for rows in context.batches(len(prompts), unit):
        seeds = [context.seed + i for i in range(rows.start, rows.stop)]
        values = (sampling.temperature, sampling.top_k, sampling.top_p)
        answers.append(context.model.generate(prompts[rows], num_images, 1, *values, seeds))
    codes = np.concatenate(answers)
    images = context.tokenizer.decode(codes.reshape(-1, codes.shape[-1]))
    return codes, images.reshape(*codes.shape[:2], *images.shape[1:])
