"""Report of an evaluation, from the records of its evaluators: `results.json` and a self-contained HTML page."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from lvm.common import files, page
from lvm.common.page import Section
from lvm.evaluation.figures import MIN_GROUPS, format_value
from lvm.inference.contact_sheet import crop_rows

Row = tuple[str, ...]
COLUMNS = ("figure", "value", "95 % interval", "baselines", "tokenizer's ceiling", "published", "meaning")


def collect_results(request: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of `results.json`: figures and plots by evaluation, and the reasons of those that were skipped."""
    figures = {name: record["figures"] for name, record in records.items() if record.get("figures")}
    plots = {
        name: {picture["title"]: picture["plot"] for picture in record["pictures"] if "plot" in picture}
        for name, record in records.items()
        if "pictures" in record
    }
    skipped = {name: record["skipped"] for name, record in records.items() if "skipped" in record}
    scenes = max((record.get("heldout_scenes") or 0 for record in records.values()), default=0)
    return {
        "request": request,
        "heldout_scenes": scenes,
        "figures": figures,
        "plots": {name: titles for name, titles in plots.items() if titles},
        "skipped": skipped,
    }


def write_report(out: epath.PathLike, results: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes an overview of the pictures, `index.html` and, last, `results.json`: it marks a complete evaluation."""
    folder = epath.Path(out)
    sheets = [
        np.asarray(Image.open(io.BytesIO((folder / picture["file"]).read_bytes())).convert("RGB"))
        for record in records.values()
        for picture in record.get("pictures", ())
        if "plot" not in picture
    ]
    if sheets:
        overview = io.BytesIO()
        Image.fromarray(crop_rows(sheets)).save(overview, format="WEBP", quality=85)
        files.write_atomically(folder / "pictures" / "overview.webp", overview.getvalue())
    files.write_atomically(folder / "index.html", render_page(results, records, folder).encode())
    files.write_json(folder / "results.json", results)


def figure_row(name: str, figure: Mapping[str, Any]) -> Row:
    """A row of `COLUMNS`."""
    unit = figure["unit"]

    def show(estimate: Mapping[str, Any] | None, with_interval: bool = False) -> str:
        if estimate is None:
            return ""
        text = format_value(estimate["value"], unit)
        return f"{text} ({_interval(estimate, unit)})" if with_interval and "interval" in estimate else text

    baselines = "; ".join(f"{key} {show(value, True)}" for key, value in figure["baselines"].items())
    published = figure.get("published")
    other = f"{format_value(published['value'], unit)} ({published['text']})" if published else ""
    better = {True: "; higher is better", False: "; lower is better", None: ""}[figure["higher_is_better"]]
    cells = (show(figure), _interval(figure, unit), baselines, show(figure.get("ceiling"), True), other)
    return (name, *cells, figure["text"] + better)


def metrics_table(results: Mapping[str, Any]) -> list[Row]:
    """Rows (figure, value, interval and baselines) of all evaluations, for a terminal."""
    rows: list[Row] = []
    for evaluation, figures in results["figures"].items():
        for name, figure in figures.items():
            _, value, interval, baselines, *_ = figure_row(name, figure)
            between = f"95 % {interval}" if interval else ""
            rows.append((f"{evaluation}: {name}", value, "; ".join(filter(None, (between, baselines)))))
    return rows


def _interval(estimate: Mapping[str, Any], unit: str) -> str:
    if "interval" not in estimate:
        return ""
    low, high = (format_value(value, unit) for value in estimate["interval"])
    return f"{low} – {high}"


def render_page(results: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]], folder: epath.Path) -> str:
    """A self-contained HTML page: for each evaluation a table of its figures, then its pictures."""
    title = "A large vision model, evaluated"
    intro = (
        f"{results['heldout_scenes']} held-out scenes. Every image is a grid of codes; "
        "a prompt is a list of images, and the answer is the codes that the model generates next. "
        "Intervals are 95 % bootstrap intervals over originals, the photos or videos that scenes are of; "
        f"figures of fewer than {MIN_GROUPS} originals have none; baselines answer without a model; "
        "the ceiling is the true answer, encoded and decoded by the tokenizer."
    )
    sections = []
    for name, record in records.items():
        if "skipped" in record:
            continue
        rows = [figure_row(key, figure) for key, figure in record["figures"].items()]
        sections.append(Section(name.replace("_", " "), metrics=[COLUMNS, *rows] if rows else ()))
        for picture in record["pictures"]:
            png = (folder / picture["file"]).read_bytes()
            sections.append(Section(picture["title"], picture["text"], picture=png, level=3))
    if results["skipped"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in results["skipped"].items())
        sections.append(Section("Not evaluated", reasons))
    return page.render_page(title, intro, (), sections)
