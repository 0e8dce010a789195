"""Labels of held-out images and of their cells, for probes of features, and features by layer on disk."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float, Integer, Shaped

from lvm.common.arrays import create_arrays
from lvm.common.logging import log_info, log_warning
from lvm.data.mixture.split import group_hash
from lvm.data.streams.codecs import Depth, Palette
from lvm.evaluation import metrics
from lvm.evaluation.evaluator import Context, NotApplicableError
from lvm.evaluation.figures import Estimate, estimate
from lvm.evaluation.heldout import HeldoutScene
from lvm.inference.pretrained import LVM

_REGION_SHARE = 0.005  # of an image's pixels, below which a region isn't counted
MAX_COUNT = 5  # more regions count as this many
VOID = -1  # the label of what has none

Labels = Shaped[np.ndarray, "n *_"]  # of images or of cells: classes, VOID for none, or values, NaN for none


@dataclasses.dataclass(frozen=True)
class ProbeImages:
    """Images of held-out scenes with their codes.

    Attributes:
      frames: scene and frame of each image.
      codes: their grids.
      groups: number of each image's original.
      folds: fold of each image; images of one original share it.
    """

    frames: Sequence[tuple[HeldoutScene, int]]
    codes: Integer[np.ndarray, "n N"]
    groups: Integer[np.ndarray, " n"]
    folds: Integer[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.frames)

    def images(self, stream: str) -> list[np.ndarray | None]:
        """The image of a stream of each frame; None where its scene lacks the stream."""
        return [scene.image(frame, stream) if stream in scene.info.streams else None for scene, frame in self.frames]


def choose_images(context: Context, stream: str, count: int, num_folds: int) -> ProbeImages:
    """`count` images of a stream, or all if there are fewer, spread over held-out scenes and their frames.

    They are in folds by group.

    Raises:
      NotApplicableError: fewer groups than folds.
    """
    scenes = context.heldout.with_streams([stream])
    scenes = scenes[:: max(1, -(-len(scenes) // count))]
    groups = sorted({scene.info.group for scene in scenes}, key=group_hash)
    if len(groups) < num_folds:
        raise NotApplicableError(f"{len(groups)} groups of held-out scenes with the stream {stream}; needs {num_folds}")
    rank = {group: index for index, group in enumerate(groups)}
    lengths = np.array([len(scene.images) for scene in scenes])
    each = next((i for i in range(1, lengths.max()) if np.minimum(lengths, i).sum() >= count), lengths.max())
    chosen = [
        (index, int(frame))
        for index, scene in enumerate(scenes)
        for frame in np.unique(np.linspace(0, len(scene.images) - 1, min(each, len(scene.images))).round())
    ]
    if len(chosen) < count:
        log_info(
            f"{len(chosen)} images are probed, not num_images={count}: all {stream} of {len(scenes)} held-out scenes, "
            f"which config.max_scenes={context.max_scenes} limits"
        )
    elif len(chosen) > count:
        chosen = [chosen[i * len(chosen) // count] for i in range(count)]
    chosen_groups = np.array([rank[scenes[index].info.group] for index, _ in chosen])
    return ProbeImages(
        [(scenes[index], frame) for index, frame in chosen],
        np.stack([scenes[index].grid(frame, stream) for index, frame in chosen]),
        chosen_groups,
        chosen_groups % num_folds,
    )


def extract(
    context: Context, model: LVM, codes: Integer[np.ndarray, "n N"], layers: Sequence[int], copies: int, folder: str
) -> Float[np.ndarray, "layers n N D"]:
    """Features at each code of each image, of each layer, as float32 in a file in `folder`, read by layer."""
    shape = (len(layers), *codes.shape, model.config.hidden_size)
    features = create_arrays(folder, {"features": (shape, np.float32)})["features"]
    for rows in context.batches(len(codes), "images"):
        batch = codes[rows]
        padded = np.pad(batch, ((0, min(context.batch_size, len(codes)) - len(batch)), (0, 0)))  # one compilation
        features[:, rows] = model.features(padded, ("codes",), layers, copies)["codes"][: len(batch)].swapaxes(0, 1)
    return features


def cells(x: Shaped[np.ndarray, "n R C"], grid: Sequence[int]) -> Shaped[np.ndarray, "n N P"]:
    """The P pixels of each of the N cells of maps, in raster order."""
    (n, height, width), (rows, columns) = x.shape, grid
    blocks = x.reshape(n, rows, height // rows, columns, width // columns)
    return blocks.transpose(0, 1, 3, 2, 4).reshape(n, rows * columns, -1)


def majority(ids: Shaped[np.ndarray, "n N P"], ignore: int | None) -> Integer[np.ndarray, "n N"]:
    """The most frequent id of each cell without void pixels, the lowest of several; `VOID` if all are void."""
    candidates = [i for i in np.unique(ids).tolist() if i != ignore]
    counts = np.stack([(ids == i).sum(-1) for i in candidates]) if candidates else np.zeros((1, *ids.shape[:2]), int)
    return np.where(counts.max(0) > 0, np.array(candidates or [VOID])[counts.argmax(0)], VOID)


def count_regions(ids: Shaped[np.ndarray, "H W"], codec: Palette) -> int:
    """Number of 4-connected regions of one class, without background, void and specks; at most `MAX_COUNT`."""
    count = 0
    for i in set(np.unique(ids).tolist()) - {codec.background, codec.ignore}:
        regions, _ = scipy.ndimage.label(ids == i)
        count += int(np.count_nonzero(np.bincount(regions.ravel())[1:] >= _REGION_SHARE * ids.size))
    return min(count, MAX_COUNT)


@dataclasses.dataclass(frozen=True)
class ProbeTask(abc.ABC):
    """A label of images or of their cells that heads predict, with its figure.

    Attributes:
      name: of its figure.
      text: the figure's meaning.
      labels: of images [n], or of cells [n, N].
      unit: of the figure.
      higher_is_better: of the figure.
    """

    name: str
    text: str
    labels: Labels
    unit: str = ""
    higher_is_better: bool = True

    @property
    def of_cells(self) -> bool:
        return self.labels.ndim == 2

    @property
    def is_class(self) -> bool:
        return np.issubdtype(self.labels.dtype, np.integer)

    @property
    def valid(self) -> Bool[np.ndarray, "*shape"]:
        return self.labels != VOID if self.is_class else ~np.isnan(self.labels)

    @abc.abstractmethod
    def statistics(self, predicted: Labels) -> Shaped[np.ndarray, "n ..."]:
        """Sums of each image that `aggregate` takes."""

    @abc.abstractmethod
    def aggregate(self, sums: Shaped[np.ndarray, "R ..."]) -> Float[np.ndarray, " R"]:
        """The figure of sums, or means, over images."""

    def estimate(self, predicted: Labels, groups: Integer[np.ndarray, " n"]) -> Estimate:
        """The figure with its interval over originals."""
        sums = self.statistics(predicted).astype(np.float64)
        sums[~self.valid.reshape(len(sums), -1).any(1)] = np.nan  # no label, no episode
        return estimate(sums, self.aggregate, groups)


class Accuracy(ProbeTask):
    """Share of correct classes."""

    def statistics(self, predicted: Labels) -> Shaped[np.ndarray, "n 1 2"]:
        correct = (predicted == self.labels) & self.valid
        return np.stack([correct, self.valid], axis=-1).reshape(len(predicted), -1, 1, 2).sum(1)

    def aggregate(self, sums: Shaped[np.ndarray, "R ..."]) -> Float[np.ndarray, " R"]:
        return metrics.mean_of_ratios(sums)


class ForegroundIoU(ProbeTask):
    """IoU of the cells of class 1, summed over images."""

    def statistics(self, predicted: Labels) -> Shaped[np.ndarray, "n 1 2"]:
        answer, truth = (predicted == 1) & self.valid, self.labels == 1
        return np.stack([(answer & truth).sum(1), (answer | truth).sum(1)], axis=-1)[:, None]

    def aggregate(self, sums: Shaped[np.ndarray, "R ..."]) -> Float[np.ndarray, " R"]:
        return metrics.mean_of_ratios(sums)


@dataclasses.dataclass(frozen=True)
class ClassIoU(ProbeTask):
    """Mean IoU of the classes but the background."""

    num_classes: int = 0
    background: int | None = None

    def statistics(self, predicted: Labels) -> Shaped[np.ndarray, "n C 3"]:
        pairs = zip(predicted, self.labels, self.valid, strict=True)
        return np.stack([metrics.class_counts(a[valid], b[valid], self.num_classes) for a, b, valid in pairs])

    def aggregate(self, sums: Shaped[np.ndarray, "R ..."]) -> Float[np.ndarray, " R"]:
        return metrics.mean_iou(sums, [] if self.background is None else [self.background])


class RootMeanSquare(ProbeTask):
    """Root of the mean squared error."""

    def statistics(self, predicted: Labels) -> Shaped[np.ndarray, "n 2"]:
        errors = np.where(self.valid, predicted - np.nan_to_num(self.labels), 0)
        return np.stack([(errors**2).sum(1), self.valid.sum(1)], axis=-1)

    def aggregate(self, sums: Shaped[np.ndarray, "R ..."]) -> Float[np.ndarray, " R"]:
        return np.sqrt(sums[:, 0] / np.where(sums[:, 1] > 0, sums[:, 1], np.nan))


def make_tasks(
    context: Context, images: ProbeImages, segmentation: str, depth: str, grid: Sequence[int]
) -> list[ProbeTask]:
    """The tasks that scenes of two folds have labels of: class, count of images; class, foreground, depth of cells."""
    tasks: list[ProbeTask] = []
    names = [scene.info.class_name for scene, _ in images.frames]
    classes = sorted(set(names) - {""})
    if len(classes) > 1:
        labels = np.array([classes.index(name) if name else VOID for name in names])
        tasks.append(Accuracy("class_accuracy", "class of the image", labels, "%"))
    palette, range_ = (context.heldout.codecs.get(stream) for stream in (segmentation, depth))
    if isinstance(palette, Palette) and (ids := _parsed(images, segmentation, palette)):
        tasks += _segmentation_tasks(images, segmentation, palette, ids, grid)
    if isinstance(range_, Depth) and (maps := _parsed(images, depth, range_)):
        values = _by_cell(images, {i: _mean_depth(cells(x[None], grid)[0]) for i, x in maps.items()}, np.nan)
        text = f"error of the cells' mean {depth} in {range_.unit}"
        tasks.append(RootMeanSquare("depth_rmse", text, values, "", False))
    return [task for task in tasks if _has_two_folds(task, images)]


def _has_two_folds(task: ProbeTask, images: ProbeImages) -> bool:
    labeled = task.valid.reshape(len(images), -1).any(1)
    folds = len(np.unique(images.folds[labeled]))
    if folds < 2:
        log_warning(
            f"no {task.name}: the {np.count_nonzero(labeled)} labeled images are in {folds} of the folds; heads need "
            "some in two"
        )
    return folds >= 2


def _segmentation_tasks(
    images: ProbeImages, stream: str, codec: Palette, ids: dict[int, np.ndarray], grid: Sequence[int]
) -> list[ProbeTask]:
    counts = np.full(len(images), VOID)
    for i, each in ids.items():
        counts[i] = count_regions(each, codec)
    labels = _by_cell(images, {i: majority(cells(x[None], grid), codec.ignore)[0] for i, x in ids.items()}, VOID)
    text = f"number of regions, 0 to {MAX_COUNT}, of {stream}"
    tasks: list[ProbeTask] = [Accuracy("count_accuracy", text, counts, "%")]
    if codec.background is not None:
        foreground = np.where(labels == VOID, VOID, labels != codec.background)
        tasks.append(ForegroundIoU("foreground_iou", f"IoU of cells whose {stream} is foreground", foreground))
    text, num_classes = f"mean IoU of the cells' classes in {stream}", len(codec.names)
    return [*tasks, ClassIoU("cell_class_miou", text, labels, "", True, num_classes, codec.background)]


def _parsed(images: ProbeImages, stream: str, codec: Palette | Depth) -> dict[int, np.ndarray]:
    """Parsed annotations by image."""
    return {i: codec.parse(image) for i, image in enumerate(images.images(stream)) if image is not None}


def _by_cell(images: ProbeImages, of_images: dict[int, np.ndarray], missing: float) -> Labels:
    """Labels [n, N] from those of some images."""
    labels = np.full(images.codes.shape, missing)
    for i, of_cells in of_images.items():
        labels[i] = of_cells
    return labels


def _mean_depth(depth: Float[np.ndarray, "N P"]) -> Float[np.ndarray, " N"]:
    """Mean over the pixels with a reading; NaN without any."""
    valid = depth > 0
    return np.where(valid.any(1), depth.sum(1, where=valid) / np.maximum(valid.sum(1), 1), np.nan)
