"""Comparison of evaluations of several models: paired bootstrap differences, and scores against size and loss."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.page import Section, render_page
from lvm.evaluation.figures import Estimate, Plot, format_value
from lvm.evaluation.plots import plot_grid
from lvm.evaluation.report import figure_row
from lvm.evaluation.run import FOLDER

_AXES = {"parameters": "parameters", "step": "training steps", "loss": "held-out loss in nats"}


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """An output of `lvm evaluate`.

    Attributes:
      name: in the comparison.
      folder: of the output.
      results: `results.json`.
      records: `evaluations/NAME.json` by name.
      resamples: `evaluations/NAME.npz` by name.
    """

    name: str
    folder: epath.Path
    results: Mapping[str, Any]
    records: Mapping[str, Mapping[str, Any]]
    resamples: Mapping[str, Mapping[str, np.ndarray]]

    @classmethod
    def load(cls, name: str, path: str) -> Evaluated:
        """Reads a folder. Raises UserError if it has no results."""
        folder = epath.Path(path)
        results = files.read_side_file(folder / "results.json")
        if "figures" not in results:
            raise UserError(f"--compare: {path} has no results.json; give outputs (--out) of `lvm evaluate`")
        records = {name: files.read_side_file(folder / FOLDER / f"{name}.json") for name in results["figures"]}
        resamples = {name: _read_arrays(folder / FOLDER / f"{name}.npz") for name in results["figures"]}
        return cls(name, folder, results, records, resamples)

    @property
    def sizes(self) -> dict[str, float]:
        """Sizes that scores may depend on, by the keys of `_AXES`, as far as they are known."""
        model = self.results["request"]["model"]
        sizes = {key: float(model[key]) for key in ("parameters", "step")}
        for figures in self.results["figures"].values():
            if "loss" in figures:  # of the evaluator `likelihood`, whatever its name is
                sizes["loss"] = figures["loss"]["value"]
        return sizes


def load_all(paths: Sequence[str]) -> list[Evaluated]:
    """Reads folders, named as by `name_folders`.

    Raises:
      UserError: fewer than two different folders, or one without results.
    """
    if len(set(paths)) < max(2, len(paths)):
        raise UserError(f"--compare={','.join(paths)} must be two different folders or more")
    return [Evaluated.load(name, path) for name, path in zip(name_folders(paths), paths, strict=True)]


def name_folders(paths: Sequence[str]) -> list[str]:
    """The last parts of the folders' paths that tell them apart.

    Raises:
      UserError: a folder is named twice.
    """
    parts = [os.path.abspath(path).split(os.sep) for path in paths]
    depth = next((d for d in range(1, 99) if len({tuple(p[-d:]) for p in parts}) == len(parts)), None)
    if depth is None:
        raise UserError(f"--compare={','.join(paths)} names a folder twice")
    return ["/".join(p[-depth:]) for p in parts]


def paired_difference(first: Evaluated, other: Evaluated, evaluation: str, figure: str) -> Estimate | None:
    """The figure of `other` minus that of `first`, with the resamples of a paired bootstrap; None if it isn't paired.

    It is if both answered the same stored episodes with the same settings, and figures are of the same version (Efron
    and Tibshirani, 1993, chapter 8: an episode's scores of both models are resampled together).
    """
    records = [model.records[evaluation] for model in (first, other)]
    asked = [(record.get("episodes"), record.get("evaluator"), record.get("version", 1)) for record in records]
    if asked[0] != asked[1] or None in asked[0]:
        return None
    before, after = (record["figures"][figure]["value"] for record in records)
    resamples = [model.resamples[evaluation].get(figure) for model in (first, other)]
    if resamples[0] is None or resamples[1] is None:
        return Estimate(after - before)
    return Estimate(after - before, np.subtract(resamples[1], resamples[0], dtype=np.float64))


def compare(models: Sequence[Evaluated]) -> dict[str, Any]:
    """The content of `comparison.json`: figures of all models, and differences from the first one."""
    figures: dict[str, Any] = {}
    for evaluation, name in _all_figures(models):
        by_model = {}
        for model in models:
            if (figure := model.results["figures"].get(evaluation, {}).get(name)) is None:
                continue
            is_other = model is not models[0] and name in models[0].results["figures"].get(evaluation, {})
            difference = paired_difference(models[0], model, evaluation, name) if is_other else None
            by_model[model.name] = figure | ({"difference": difference.to_json()} if difference else {})
        figures.setdefault(evaluation, {})[name] = by_model
    described = {model.name: {"folder": os.fspath(model.folder), **model.sizes} for model in models}
    return files.as_json({"models": described, "figures": figures})


def write_comparison(out: epath.PathLike, models: Sequence[Evaluated]) -> None:
    """Writes `index.html` and, last, `comparison.json`."""
    folder = epath.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    content = compare(models)
    files.write_atomically(folder / "index.html", _render(content, models).encode())
    files.write_json(folder / "comparison.json", content)


def _all_figures(models: Sequence[Evaluated]) -> list[tuple[str, str]]:
    """Evaluations and figures that any of the models has, in order."""
    pairs = [(e, f) for model in models for e, figures in model.results["figures"].items() for f in figures]
    evaluations = list(dict.fromkeys(evaluation for evaluation, _ in pairs))
    return sorted(dict.fromkeys(pairs), key=lambda pair: evaluations.index(pair[0]))


def _render(content: Mapping[str, Any], models: Sequence[Evaluated]) -> str:
    first = models[0].name
    intro = (
        f"Differences are from {first}, with 95 % intervals of a paired bootstrap over the originals of the questions "
        "that both models answered; one whose interval contains 0, or without one, may be chance. Baselines and "
        "ceilings are the first model's."
    )
    sections = []
    for evaluation, figures in content["figures"].items():
        sections.append(Section(evaluation.replace("_", " "), metrics=figure_table(figures, first)))
        for axis, label in _AXES.items():
            if plots := _plots(figures, content["models"], axis):
                title = f"{evaluation.replace('_', ' ').capitalize()} against {label}"
                sections.append(Section(title, picture=plot_grid(plots), level=3))
        for model in models:
            for picture in model.records.get(evaluation, {}).get("pictures", ()):
                if "plot" not in picture:
                    png = (model.folder / picture["file"]).read_bytes()
                    sections.append(Section(f"{picture['title']}: {model.name}", picture["text"], picture=png, level=3))
    sizes = [[name, *(_number(model.get(axis)) for axis in _AXES)] for name, model in content["models"].items()]
    sections.insert(0, Section("Models", table=[["model", *_AXES.values()], *sizes]))
    return render_page("Large vision models, compared", intro, (), sections)


def figure_table(figures: Mapping[str, Mapping[str, Any]], first: str) -> list[tuple[str, ...]]:
    """A header, then a row for each figure and model; `figures` are JSON by figure and model, `first` is a model."""
    header = ("figure, of", "value", "95 % interval", f"difference from {first}", "baselines", "ceiling", "published",
              "meaning")  # fmt: skip
    return [header, *(row for name, by_model in figures.items() for row in _figure_rows(name, by_model, first))]


def _figure_rows(name: str, by_model: Mapping[str, Any], first: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for model, figure in by_model.items():
        _, value, interval, *explanation = figure_row(name, figure)
        difference = _describe_difference(figure) if model != first and first in by_model else ""
        rest = explanation if not rows else [""] * len(explanation)
        rows.append((f"{name}, {model}", value, interval, difference, *rest))
    return rows


def _describe_difference(figure: Mapping[str, Any]) -> str:
    if "difference" not in figure:
        return "not paired"
    value, unit = figure["difference"]["value"], figure["unit"]
    if math.isnan(value):
        return ""
    if "interval" not in figure["difference"]:
        return _signed(value, unit)
    low, high = figure["difference"]["interval"]
    is_better = {True: low > 0, False: high < 0}.get(figure["higher_is_better"], False)
    is_worse = {True: high < 0, False: low > 0}.get(figure["higher_is_better"], False)
    verdict = ", better" if is_better else ", worse" if is_worse else ""
    return f"{_signed(value, unit)} ({_signed(low, unit)} to {_signed(high, unit)}){verdict}"


def _signed(value: float, unit: str) -> str:
    return ("−" if value < 0 else "+") + format_value(abs(value), unit)


def _plots(figures: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]], axis: str) -> list[Plot]:
    """A plot of each figure against an axis on which the models differ; [] if they don't."""
    plots = []
    for name, by_model in figures.items():
        points = sorted(
            (models[model][axis], figure["value"], *figure.get("interval", ()))
            for model, figure in by_model.items()
            if models[model].get(axis) is not None and figure["value"] is not None
        )
        differs = len({point[0] for point in points}) > 1 and len(set(map(len, points))) == 1
        if differs and name != axis:  # the loss against itself
            plots.append(Plot({name: points}, _AXES[axis], name, log_x=axis != "loss"))
    return plots


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if value % 1 else f"{value:,.0f}"


def _read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        return dict(arrays)
