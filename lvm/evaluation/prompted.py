"""In-context tasks: pairs of an image and its annotation, then a query image whose annotation is the answer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8

from lvm.common import statistics
from lvm.data.streams.codecs import Codec, Depth, Palette
from lvm.evaluation import metrics
from lvm.evaluation.heldout import Heldout, HeldoutScene

AnswerFn = Callable[[np.ndarray, int], np.ndarray]  # prompts int [B, K, N], images A → answers int [B, A, N]
Images = UInt8[np.ndarray, "B H W 3"]
DecodeFn = Callable[[np.ndarray], np.ndarray]  # codes int [B, N] → images uint8 [B, R, R, 3]


@dataclasses.dataclass(frozen=True)
class Query:
    """A frame to annotate, with frames of other scenes as examples."""

    scene: HeldoutScene
    frame: int
    examples: tuple[tuple[HeldoutScene, int], ...]

    def prompt(self, input_stream: str, target_stream: str) -> Integer[np.ndarray, "K N"]:
        """Grids x1 y1 … xn yn xq."""
        streams = (input_stream, target_stream)
        pairs = [scene.grid(frame, stream) for scene, frame in self.examples for stream in streams]
        return np.stack([*pairs, self.scene.grid(self.frame, input_stream)])


def make_queries(scenes: Sequence[HeldoutScene], count: int, shots: int, seed: int) -> list[Query]:
    """Queries over all scenes in turn, with random frames and examples from other scenes; [] for too few scenes."""
    if len(scenes) <= shots:
        return []
    queries = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = index % len(scenes)
        others = [i for i in rng.permutation(len(scenes)).tolist() if i != scene][:shots]
        examples = tuple((scenes[i], int(rng.integers(len(scenes[i].images)))) for i in others)
        queries.append(Query(scenes[scene], int(rng.integers(len(scenes[scene].images))), examples))
    return queries


@dataclasses.dataclass(frozen=True)
class Answers:
    """Queries of one task with a model's answers; `copied` are the last examples' annotations, the copy baseline."""

    queries: list[Query]
    input_stream: str
    target_stream: str
    codes: Integer[np.ndarray, "B N"]
    images: Images
    truth: Images
    copied: Images

    def scores(self, codec: Codec) -> dict[str, Any]:
        """PSNR, and the metrics of segmentation or depth if `codec` (of the target stream) is one."""
        scores: dict[str, Any] = {
            "num_queries": len(self.queries),
            "psnr": float(statistics.psnr(self.images, self.truth).mean()),
            "psnr_copy_baseline": float(statistics.psnr(self.copied, self.truth).mean()),
        }
        if isinstance(codec, Palette):
            scores |= segmentation_metrics(self.images, self.truth, self.copied, codec)
        if isinstance(codec, Depth):
            predicted, truth = (np.stack([codec.parse(x) for x in images]) for images in (self.images, self.truth))
            scores |= metrics.depth_errors(predicted, truth)
        return scores


def answer_queries(
    queries: list[Query], input_stream: str, target_stream: str, answer: AnswerFn, decode: DecodeFn
) -> Answers:
    """Prompts a model with every query."""
    prompts = np.stack([query.prompt(input_stream, target_stream) for query in queries])  # [B, K, N]
    codes = answer(prompts, 1)[:, 0]  # [B, N]
    truth = np.stack([query.scene.image(query.frame, target_stream) for query in queries])
    last_examples = [query.examples[-1] for query in queries]
    copied = np.stack([scene.image(frame, target_stream) for scene, frame in last_examples])
    return Answers(queries, input_stream, target_stream, codes, decode(codes), truth, copied)


def segmentation_metrics(images: Images, truth: Images, copied: Images, codec: Palette) -> dict[str, Any]:
    """Segmentation metrics of answers, next to trivial baselines.

    `foreground_iou` is the mean over queries of the foreground's IoU (the "mIoU" of visual prompting); its baselines
    copy an example or mark all pixels as foreground. `class_miou` is computed from one confusion matrix; its chance
    level permutes the classes of each answer at random.
    """
    labels, expected, copies = (np.stack([codec.parse(x) for x in batch]) for batch in (images, truth, copied))
    counts = metrics.confusion(labels, expected, len(codec.names), codec.ignore)
    copy_counts = metrics.confusion(copies, expected, len(codec.names), codec.ignore)
    exclude = [] if codec.background is None else [codec.background]
    results: dict[str, Any] = {
        "pixel_accuracy": metrics.accuracy(counts),
        "pixel_accuracy_copy_baseline": metrics.accuracy(copy_counts),
        "class_miou": metrics.mean_iou(counts, exclude),
        "class_miou_chance": _chance_miou(labels, expected, codec, exclude),
    }
    if codec.background is not None:
        foreground = expected != codec.background
        ious = metrics.iou(labels != codec.background, foreground)
        results |= {
            "foreground_iou": float(ious.mean()),
            "foreground_iou_ci95": metrics.bootstrap(ious),
            "foreground_iou_all_foreground": float(metrics.iou(np.ones_like(foreground), foreground).mean()),
            "foreground_iou_copy_baseline": float(metrics.iou(copies != codec.background, foreground).mean()),
        }
    return results


def _chance_miou(labels: np.ndarray, truth: np.ndarray, codec: Palette, exclude: list[int], repeats: int = 20) -> float:
    rng = np.random.default_rng(0)
    classes = np.array([i for i in codec.used_ids.tolist() if i not in exclude], np.uint8)
    scores = []
    for _ in range(repeats):
        permuted = np.empty_like(labels)
        for image, out in zip(labels, permuted, strict=True):
            table = np.arange(256, dtype=np.uint8)
            table[classes] = rng.permutation(classes)
            out[:] = table[image]
        counts = metrics.confusion(permuted, truth, len(codec.names), codec.ignore)
        scores.append(metrics.mean_iou(counts, exclude))
    return float(np.mean(scores))


def task_following(tasks: Sequence[Answers], heldout: Heldout, num_codes: int) -> dict[str, Any]:
    """Task-following accuracy: the share of answers classified as the stream that their examples show.

    `by_codes` classifies by a unigram model of each stream's held-out codes (the kind of image); `judge_accuracy` is
    that classifier's accuracy on the true images of the same queries. `by_pixels` takes the stream whose true image of
    the query is nearest by squared error (the right content as well).

    Returns:
      {"by_codes": {target: share, …, "all": share}, "by_pixels": likewise, "judge_accuracy": share}.
    """
    shared = set.intersection(*(set(query.scene.info.streams) for task in tasks for query in task.queries))
    streams = [stream for stream in heldout.codecs if stream in shared]
    counts = [np.bincount(heldout.codes(stream).ravel(), minlength=num_codes) + 0.5 for stream in streams]
    log_probs = np.stack([np.log(c / c.sum()) for c in counts])  # [streams, num_codes]

    def classify(codes: np.ndarray) -> np.ndarray:
        return np.argmax(log_probs[:, codes].sum(-1), axis=0)  # codes [B, N] → stream indices [B]

    by_codes, by_pixels, judge = {}, {}, []
    for task in tasks:
        expected = streams.index(task.target_stream)
        by_codes[task.target_stream] = float(np.mean(classify(task.codes) == expected))
        by_pixels[task.target_stream] = float(np.mean(_nearest_stream(task, streams) == expected))
        truth = np.stack([query.scene.grid(query.frame, task.target_stream) for query in task.queries])
        judge.append(np.mean(classify(truth) == expected))
    for shares in (by_codes, by_pixels):
        shares["all"] = float(np.mean(list(shares.values())))
    return {"by_codes": by_codes, "by_pixels": by_pixels, "judge_accuracy": float(np.mean(judge))}


def _nearest_stream(task: Answers, streams: Sequence[str]) -> np.ndarray:
    """Index of the stream whose true image is nearest to each answer, [B]."""
    distances = []
    for stream in streams:
        truth = np.stack([query.scene.image(query.frame, stream) for query in task.queries])
        distances.append(np.mean((task.images.astype(np.float64) - truth) ** 2, axis=(1, 2, 3)))
    return np.argmin(distances, axis=0)
