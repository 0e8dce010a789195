"""Tasks asked by example: pairs of an image and its annotation, then an image whose annotation is the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lvm.common import statistics
from lvm.data.streams.codecs import Depth, Palette
from lvm.evaluation import metrics
from lvm.evaluation.heldout import Heldout, HeldoutScene

AnswerFn = Callable[
    [np.ndarray, int], np.ndarray
]  # prompts int [B, K, N], images wanted → int [B, images, N]
DecodeFn = Callable[[np.ndarray], np.ndarray]  # codes int [B, N] → images uint8 [B, R, R, 3]


@dataclasses.dataclass(frozen=True)
class Query:
    """A frame to annotate, with frames of other scenes as examples."""

    scene: HeldoutScene
    frame: int
    examples: tuple[tuple[HeldoutScene, int], ...]

    def prompt(self, input_stream: str, target_stream: str) -> np.ndarray:
        """x1 y1 … xn yn xq as grids int [2n+1, N]."""
        grids = []
        for scene, frame in self.examples:
            grids += [scene.grid(frame, input_stream), scene.grid(frame, target_stream)]
        return np.stack([*grids, self.scene.grid(self.frame, input_stream)])


def make_queries(scenes: Sequence[HeldoutScene], count: int, shots: int, seed: int) -> list[Query]:
    """Queries over all scenes in turn, each frame drawn, each example from another scene; [] if there are too few."""
    if len(scenes) <= shots:
        return []
    queries = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        own = number % len(scenes)
        others = [i for i in rng.permutation(len(scenes)).tolist() if i != own][:shots]
        examples = tuple((scenes[i], int(rng.integers(len(scenes[i].images)))) for i in others)
        queries.append(Query(scenes[own], int(rng.integers(len(scenes[own].images))), examples))
    return queries


@dataclasses.dataclass(frozen=True)
class Answers:
    """Queries with what a model answered.

    Attributes:
      codes: the answers, int [B, N].
      images: decoded, uint8 [B, R, R, 3].
      truth, copied: the true images, and the last example's annotation, of the same shape.
    """

    queries: list[Query]
    input_stream: str
    target_stream: str
    codes: np.ndarray
    images: np.ndarray
    truth: np.ndarray
    copied: np.ndarray

    def scores(self, codec: Any) -> dict[str, Any]:
        """What the target's codec allows to score, and PSNR for every target."""
        scores: dict[str, Any] = {
            "num_queries": len(self.queries),
            "psnr": float(statistics.psnr(self.images, self.truth).mean()),
            "psnr_copy_baseline": float(statistics.psnr(self.copied, self.truth).mean()),
        }
        if isinstance(codec, Palette):
            scores |= segmentation_metrics(self.images, self.truth, self.copied, codec)
        if isinstance(codec, Depth):
            answered = np.stack([codec.parse(image) for image in self.images])
            scores |= metrics.depth_errors(answered, np.stack([codec.parse(image) for image in self.truth]))
        return scores


def answer_queries(
    queries: list[Query], input_stream: str, target_stream: str, answer: AnswerFn, decode: DecodeFn
) -> Answers:
    """Asks for every query's `target_stream`, shown by its examples."""
    prompts = np.stack([query.prompt(input_stream, target_stream) for query in queries])  # [B, 2n+1, N]
    codes = answer(prompts, 1)[:, 0]  # [B, N]
    truth = np.stack([query.scene.image(query.frame, target_stream) for query in queries])
    copied = np.stack(
        [query.examples[-1][0].image(query.examples[-1][1], target_stream) for query in queries]
    )
    return Answers(queries, input_stream, target_stream, codes, decode(codes), truth, copied)


def segmentation_metrics(
    images: np.ndarray, truth: np.ndarray, copied: np.ndarray, codec: Palette
) -> dict[str, Any]:
    """Scores of segmentation answers, all uint8 [B, R, R, 3].

    `foreground_iou` is the mean over queries of the foreground's IoU (the "mIoU" of visual prompting), beside
    two answers that need no model; `class_miou` sums a confusion matrix first, beside the chance that the same
    masks would have if each answer's classes were drawn by lot.
    """
    labels, right, other = (np.stack([codec.parse(x) for x in part]) for part in (images, truth, copied))
    num_classes = len(codec.names)
    counts = metrics.confusion(labels, right, num_classes, codec.ignore)
    leave_out = [] if codec.background is None else [codec.background]
    figures: dict[str, Any] = {
        "pixel_accuracy": metrics.accuracy(counts),
        "pixel_accuracy_copy_baseline": metrics.accuracy(
            metrics.confusion(other, right, num_classes, codec.ignore)
        ),
        "class_miou": metrics.mean_iou(counts, leave_out),
        "class_miou_chance": _chance(labels, right, codec, leave_out),
    }
    if codec.background is not None:
        masks = metrics.iou(labels != codec.background, right != codec.background)
        figures |= {
            "foreground_iou": float(masks.mean()),
            "foreground_iou_ci95": metrics.bootstrap(masks),
            "foreground_iou_all_foreground": float(
                metrics.iou(np.ones_like(right, bool), right != codec.background).mean()
            ),
            "foreground_iou_copy_baseline": float(
                metrics.iou(other != codec.background, right != codec.background).mean()
            ),
        }
    return figures


def _chance(
    labels: np.ndarray, truth: np.ndarray, codec: Palette, leave_out: list[int], draws: int = 20
) -> float:
    rng = np.random.default_rng(0)
    classes = np.array([i for i in codec.used_ids.tolist() if i not in leave_out], np.uint8)
    scores = []
    for _ in range(draws):
        shuffled = np.empty_like(labels)
        for image, out in zip(labels, shuffled, strict=True):
            table = np.arange(256, dtype=np.uint8)
            table[classes] = rng.permutation(classes)
            out[:] = table[image]
        counts = metrics.confusion(shuffled, truth, len(codec.names), codec.ignore)
        scores.append(metrics.mean_iou(counts, leave_out))
    return float(np.mean(scores))


def task_following(asked: Sequence[Answers], heldout: Heldout, num_codes: int) -> dict[str, Any]:
    """How often an answer is of the stream that its examples showed, as told by two judges.

    `by_codes` takes the stream whose codes' frequencies (over all held-out images) make the answer's codes most
    likely: it asks what kind of image the answer is. `judge_accuracy` is its share of right calls on the true
    images of the same queries. `by_pixels` takes the stream whose true image of the query is nearest by squared
    error, so it asks for the right content too.

    Returns:
      {"by_codes": {target: share, …, "all": share}, "by_pixels": likewise, "judge_accuracy": share}.
    """
    shared = set.intersection(*(set(query.scene.info.streams) for a in asked for query in a.queries))
    streams = [stream for stream in heldout.codecs if stream in shared]
    log_shares = []
    for stream in streams:
        counts = np.bincount(heldout.codes(stream).ravel(), minlength=num_codes) + 0.5
        log_shares.append(np.log(counts / counts.sum()))
    table = np.stack(log_shares)  # [streams, num_codes]

    def of_stream(codes: np.ndarray) -> np.ndarray:
        return np.argmax(table[:, codes].sum(-1), axis=0)  # codes [B, N] → [B]

    by_codes, by_pixels, right = {}, {}, []
    for answers in asked:
        wanted = streams.index(answers.target_stream)
        by_codes[answers.target_stream] = float(np.mean(of_stream(answers.codes) == wanted))
        by_pixels[answers.target_stream] = float(np.mean(_nearest(answers, streams) == wanted))
        truth = np.stack([query.scene.grid(query.frame, answers.target_stream) for query in answers.queries])
        right.append(np.mean(of_stream(truth) == wanted))
    for shares in (by_codes, by_pixels):
        shares["all"] = float(np.mean(list(shares.values())))
    return {"by_codes": by_codes, "by_pixels": by_pixels, "judge_accuracy": float(np.mean(right))}


def _nearest(answers: Answers, streams: Sequence[str]) -> np.ndarray:
    distances = []
    for stream in streams:
        truth = np.stack([query.scene.image(query.frame, stream) for query in answers.queries])
        distances.append(np.mean((answers.images.astype(np.float64) - truth) ** 2, axis=(1, 2, 3)))
    return np.argmin(distances, axis=0)  # [B]
