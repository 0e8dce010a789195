"""Probes of frozen features by layer: heads that predict labels of images and of their cells."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer

from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.common.validation import check_positive
from lvm.evaluation import heads
from lvm.evaluation.evaluator import Context, Evaluator, NotApplicableError, Result, StoppedError
from lvm.evaluation.figures import Estimate, Figure, Picture, Plot
from lvm.evaluation.probing import Labels, ProbeImages, ProbeTask, choose_images, extract, make_tasks
from lvm.inference.pretrained import LVM

_HISTOGRAM, _PRIOR = "histogram of codes", "prior"
_FIRST, _SECOND, _RANDOM = "first copy", "second copy", "random network"
_PREDICTED_AT_ONCE = 4096
_LINEAR = "linear"  # the head of cells
_HEADS = {
    "mean": "a linear head on the mean over codes",
    "last": "a linear head on the last code",
    "knn": "nearest neighbors of the mean over codes",
    "attentive": "AIM's attentive head",
}  # of images
Indices = Integer[np.ndarray, "_"]
FitPredict = Callable[[Indices, Indices], np.ndarray]  # samples to fit on, and to predict → predictions
Estimates = dict[tuple[str, str, str, int], Estimate]  # task, head, features, layer


@dataclasses.dataclass(frozen=True)
class Probes(Evaluator):
    """Heads on the hidden states of each layer, fitted on held-out images and measured on others, by cross-fitting.

    The images are divided into folds by group; each is predicted by heads that were fitted on the other folds. A linear
    head is a multinomial logistic regression, of depth a ridge regression; the heads of images are `_HEADS`. Layer 0 is
    the code embedding, which is a set of random vectors in the random network. The second copy is that of an image
    given twice, whose codes have seen all of it, as in a causal model the first one's have not.

    Attributes:
      stream: of the images.
      segmentation: stream of the count of regions and of the cells' classes and foreground.
      depth: stream of the cells' depth.
      num_images: images, spread over the held-out scenes.
      max_layers: layers that are probed, spread over all of them, the first and the last included.
      folds: of cross-fitting.
      fit_cells: samples of cells that a head is fitted on, at most; all images of the other folds are.
      l2: weight decay of linear heads (`lvm.evaluation.heads`).
      neighbors: of the nearest-neighbor head.
      attentive_steps: of training an attentive head.
    """

    kind = "probes"

    stream: str = "rgb"
    segmentation: str = "segmentation"
    depth: str = "depth"
    num_images: int = 1024
    max_layers: int = 9
    folds: int = 4
    fit_cells: int = 8192
    l2: float = 1e-3
    neighbors: int = 20
    attentive_steps: int = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_images", "fit_cells", "l2", "neighbors", "attentive_steps")
        for name in ("max_layers", "folds"):
            if getattr(self, name) < 2:
                raise UserError(f"{name}={getattr(self, name)} must be at least 2")

    def run(self, context: Context) -> Result:
        images = choose_images(context, self.stream, self.num_images, self.folds)
        tasks = make_tasks(context, images, self.segmentation, self.depth, context.tokenizer.identity["grid"])
        if not tasks:
            raise NotApplicableError(
                f"held-out scenes in two folds have neither two classes nor {self.segmentation} nor {self.depth}"
            )
        context.episodes = [[scene.info.key, frame] for scene, frame in images.frames]
        num_layers = context.model.config.num_layers
        layers = (
            np.unique(np.linspace(0, num_layers, min(self.max_layers, num_layers + 1)).round()).astype(int).tolist()
        )
        estimates: Estimates = {}
        for name, model, copies in _feature_sets(context):
            log_info(f"probes of the {name}, {len(images)} images, layers {', '.join(map(str, layers))}")
            for layer, features in _by_layer(context, model, images, layers, copies):
                for task in tasks:
                    for head, predicted in self._predictions(context, task, features, images).items():
                        estimates[task.name, head, name, layer] = task.estimate(predicted, images.groups)
        for task in tasks:
            for (head, name), predicted in self._without_layers(context, task, images).items():
                estimates[task.name, head, name, 0] = task.estimate(predicted, images.groups)
        figures = [figure for task in tasks for figure in _figures(task, estimates, layers, len(images))]
        return figures, [_plot(task, estimates, layers) for task in tasks]

    def _predictions(
        self, context: Context, task: ProbeTask, x: Float[np.ndarray, "n N D"], images: ProbeImages
    ) -> dict[str, Labels]:
        """Predictions of each head from features at each code."""
        if task.of_cells:
            return {_LINEAR: self._linear(context, task, x, images)}
        mean, num_heads = x.mean(1), context.model.config.num_heads
        classes = int(task.labels.max()) + 1

        def attentive(fit: Indices, test: Indices) -> np.ndarray:
            steps = self.attentive_steps
            return heads.fit_attentive(x, fit, task.labels, classes, num_heads, steps, context.seed)(x[test])

        return {
            "mean": self._linear(context, task, mean, images),
            "last": self._linear(context, task, x[:, -1], images),
            "knn": self._nearest(task, mean, images),
            "attentive": self._cross_fit(task.labels, task.valid, images.folds, attentive),
        }

    def _without_layers(self, context: Context, task: ProbeTask, images: ProbeImages) -> dict[tuple[str, str], Labels]:
        """Predictions without a network: the histogram of an image's codes; the prior of the label at its position."""
        by_position = task.labels.reshape(len(images), -1)
        valid = task.valid.reshape(by_position.shape)

        def prior(fit: Indices, test: Indices) -> np.ndarray:
            means = [_prior(by_position[fit, i][valid[fit, i]], task.is_class) for i in range(by_position.shape[1])]
            return np.broadcast_to(np.array(means), (len(test), len(means))).reshape(len(test), *task.labels.shape[1:])

        predicted = self._cross_fit(task.labels, np.ones(len(images), bool), images.folds, prior)
        if task.of_cells:
            return {(_LINEAR, _PRIOR): predicted}
        counts = np.stack([np.bincount(grid, minlength=context.tokenizer.num_codes) for grid in images.codes])
        counts = counts[:, counts.any(0)].astype(np.float32)
        linear = self._linear(context, task, counts, images)
        every = {"mean": linear, "last": linear, "attentive": linear, "knn": self._nearest(task, counts, images)}
        return {
            **{(head, _PRIOR): predicted for head in _HEADS},
            **{(head, _HISTOGRAM): x for head, x in every.items()},
        }

    def _linear(self, context: Context, task: ProbeTask, x: np.ndarray, images: ProbeImages) -> Labels:
        flat, labels = x.reshape(-1, x.shape[-1]), task.labels.ravel()

        def fit_predict(fit: Indices, test: Indices) -> np.ndarray:
            if len(fit) > self.fit_cells and task.of_cells:
                fit = np.sort(np.random.default_rng(context.seed).choice(fit, self.fit_cells, replace=False))
            normalization = heads.standardize(flat[fit])
            fit_head = heads.fit_logistic if task.is_class else heads.fit_ridge
            head = fit_head(normalization(flat[fit]), labels[fit], self.l2)
            parts = [test[i : i + _PREDICTED_AT_ONCE] for i in range(0, len(test), _PREDICTED_AT_ONCE)]
            return np.concatenate([head(normalization(flat[part])) for part in parts])

        folds = np.repeat(images.folds, labels.size // len(images))
        return self._cross_fit(labels, task.valid.ravel(), folds, fit_predict).reshape(task.labels.shape)

    def _nearest(self, task: ProbeTask, x: Float[np.ndarray, "n D"], images: ProbeImages) -> Labels:
        def fit_predict(fit: Indices, test: Indices) -> np.ndarray:
            normalization = heads.standardize(x[fit])
            fitted, asked = normalization(x[fit]), normalization(x[test])
            return heads.predict_neighbors(fitted, task.labels[fit], asked, self.neighbors)

        return self._cross_fit(task.labels, task.valid, images.folds, fit_predict)

    def _cross_fit(
        self, labels: Labels, valid: Bool[np.ndarray, " m"], folds: Indices, fit_predict: FitPredict
    ) -> Labels:
        """Predictions of each sample by what was fitted on the valid samples of the other folds."""
        predicted = np.zeros_like(labels)
        for fold in range(self.folds):
            fit, test = np.flatnonzero(valid & (folds != fold)), np.flatnonzero(folds == fold)
            if len(fit) and len(test):
                predicted[test] = fit_predict(fit, test)
        return predicted


def _feature_sets(context: Context) -> Iterator[tuple[str, LVM, int]]:
    """Name, network and copies of the image of each set of features; the second copy if two fit the context."""
    model, num_codes = context.model, context.tokenizer.codes_per_image
    yield _FIRST, model, 1
    if 2 * num_codes + (model.vocabulary.bos is not None) <= model.config.context:
        yield _SECOND, model, 2
    yield _RANDOM, model.with_random_params(context.seed), 1


def _by_layer(
    context: Context, model: LVM, images: ProbeImages, layers: Sequence[int], copies: int
) -> Iterator[tuple[int, Float[np.ndarray, "n N D"]]]:
    """Features of each layer, of which one is in memory at a time."""
    with tempfile.TemporaryDirectory() as folder:
        features = extract(context, model, images.codes, layers, copies, folder)
        for layer, of_layer in zip(layers, features, strict=True):
            if context.stopping():
                raise StoppedError
            yield layer, np.array(of_layer)


def _prior(labels: np.ndarray, is_class: bool) -> float | int:
    if not len(labels):
        return 0
    return int(np.bincount(labels).argmax()) if is_class else float(labels.mean())


def _figures(task: ProbeTask, estimates: Estimates, layers: Sequence[int], num_images: int) -> Iterator[Figure]:
    """Figures of the last layer and of one between, if any, and of cells of the last one of the second copy."""
    middle, last = layers[len(layers) // 2], layers[-1]
    for head, head_text in {_LINEAR: "a linear head at each code"}.items() if task.of_cells else _HEADS.items():
        by_set = {key[2:]: value for key, value in estimates.items() if key[:2] == (task.name, head)}
        prior = "position alone" if task.of_cells else "most frequent"
        common = {"code embedding": by_set[_FIRST, 0], "random code vectors": by_set[_RANDOM, 0]}
        common |= {prior: by_set[_PRIOR, 0]}
        common |= {_HISTOGRAM: by_set[_HISTOGRAM, 0]} if (_HISTOGRAM, 0) in by_set else {}
        name = task.name if task.of_cells else f"{task.name}/{head}"
        for suffix, features, layer in (
            ("", _FIRST, last),
            ("/middle", _FIRST, middle),
            ("/second_copy", _SECOND, last),
        ):
            is_omitted = (features == _SECOND and not task.of_cells) or (suffix == "/middle" and middle == last)
            if is_omitted or (features, layer) not in by_set:
                continue
            baselines = common | {"random network, same layer": by_set[_RANDOM, layer]}
            baselines |= {_FIRST: by_set[_FIRST, layer]} if features == _SECOND else {}
            text = f"{task.text}, by {head_text}, layer {layer} of {last}; {num_images} images"
            text += "; of the second copy" if features == _SECOND else ""
            yield Figure(f"{name}{suffix}", by_set[features, layer], text, task.unit, task.higher_is_better, baselines)


def _plot(task: ProbeTask, estimates: Estimates, layers: Sequence[int]) -> Picture:
    """The layer curve of each set of features, of images also of each head; those without a network are constant."""
    series: dict[str, list[tuple[float, ...]]] = {}
    for name, head, features, _ in estimates:
        of_head = not task.of_cells and features not in (_PRIOR, _HISTOGRAM)
        label = f"{head}, {features}" if of_head else features
        is_minor = of_head and features != _FIRST and head != "attentive"
        if name != task.name or is_minor or label in series:
            continue
        at = {x: estimates.get((name, head, features, x), estimates[name, head, features, 0]) for x in layers}
        # Bands of that many curves of images would hide each other.
        series[label] = [(float(x), y.value, *((task.of_cells and y.interval) or ())) for x, y in at.items()]
    title = f"{task.name.replace('_', ' ').capitalize()}, by layer"
    text = (
        f"{task.text[0].upper()}{task.text[1:]}, of heads on frozen features; layer 0 is the code embedding, in the "
        f"random network random vectors.{' Bands are 95 % intervals over originals.' if task.of_cells else ''}"
    )
    return Picture(title, text, Plot(series, "layer", task.name.replace("_", " ")))
