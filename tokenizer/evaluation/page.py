"""Report of one or more tokenizers on the same images: `report.json` and a self-contained HTML page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lvm.common import files
from lvm.common.page import Section, render_page
from lvm.evaluation.compare import figure_table
from lvm.evaluation.figures import Estimate, Figure, Plot
from lvm.evaluation.plots import plot_curves
from lvm.inference.contact_sheet import Cell, Pixels, render_sheet
from lvm.model.nnx_utils import count_params
from tokenizer.evaluation.measure import Measurement
from tokenizer.evaluation.running import Example

_SIDE = 128  # of an image on the page
_LABEL = 18  # characters above an image
_CURVE_POINTS = 200


def write_report(out: epath.PathLike, request: Mapping[str, Any], measurements: Mapping[str, Measurement]) -> None:
    """Writes `index.html` and, last, `report.json`.

    Args:
      request: source, weights and other settings, as JSON.
      measurements: by the tokenizer's name; differences are from the first.
    """
    folder = epath.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    content = collect_results(request, measurements)
    files.write_atomically(folder / "index.html", _render(content, measurements).encode())
    files.write_json(folder / "report.json", content)


def collect_results(request: Mapping[str, Any], measurements: Mapping[str, Measurement]) -> dict[str, Any]:
    """The content of `report.json`: sizes and figures of each tokenizer, with differences from the first."""
    tokenizers: dict[str, Any] = {}
    figures: dict[str, dict[str, Any]] = {}
    first: dict[str, Figure] = {}
    base = next(iter(measurements.values()))
    for name, measurement in measurements.items():
        by_name = {figure.name: figure for figure in measurement.figures()}
        is_paired = measurement.is_paired(base)
        for figure in by_name.values():
            content = figure.to_json()
            before = first.get(figure.name)
            if before and is_paired:
                content["difference"] = _difference(before, figure).to_json()
            figures.setdefault(figure.name, {})[name] = content
        first = first or by_name
        tokenizers[name] = _describe(measurement)
    return files.as_json({"request": request, "tokenizers": tokenizers, "figures": figures})


def _difference(base: Figure, figure: Figure) -> Estimate:
    before, after = base.estimate, figure.estimate
    if before.resamples is None or after.resamples is None:
        return Estimate(after.value - before.value)
    return Estimate(after.value - before.value, after.resamples - before.resamples)


def _describe(measurement: Measurement) -> dict[str, Any]:
    tokenizer, examples = measurement.tokenizer, measurement.examples
    extremes = {
        kind: [
            {"key": example.key, "stream": example.stream, "psnr": example.psnr} for example in getattr(examples, kind)
        ]
        for kind in ("worst", "best")
    }
    return {
        **tokenizer.identity(),
        "parameters": count_params(tokenizer.params),
        "compute_dtype": tokenizer.config.compute_dtype,
        "step": tokenizer.step,
        "images": dict(measurement.num_images),
        "skipped": measurement.num_skipped,
        "codes_used": {stream: int(np.count_nonzero(counts)) for stream, counts in measurement.counts.items()},
        **extremes,
    }


def _render(content: Mapping[str, Any], measurements: Mapping[str, Measurement]) -> str:
    first = next(iter(measurements))
    counts = _by_tokenizer({name: [_count_images(each)] for name, each in measurements.items()})
    missing = _by_tokenizer({name: each.missing() for name, each in measurements.items()})
    intro = (
        f"Images of {content['request']['source_path']}: {counts} Each is "
        "preprocessed as its tokenizer does, encoded and decoded. Intervals are 95 % bootstrap intervals over photos "
        "and videos; FID has none, and of fewer images than its 2,048 features it is mostly bias."
    )
    if len(measurements) > 1:
        intro += f" Differences are from {first}, with intervals of a paired bootstrap over the same images."
        unpaired = [name for name, other in measurements.items() if not other.is_paired(measurements[first])]
        intro += f" Of other images, and not paired: {', '.join(unpaired)}." if unpaired else ""
    sections = [
        Section("Figures", missing, metrics=figure_table(content["figures"], first)),
        Section("Tokenizers", table=_sizes(content["tokenizers"])),
        Section(
            "Codes by frequency", "The share of all that each code has, most frequent first.",
            picture=plot_curves(_frequencies(measurements)),
        ),
        Section(
            "A sample of images", "Above the reconstructions by each tokenizer.", picture=_sample_sheet(measurements)
        ),
    ]  # fmt: skip
    for name, measurement in measurements.items():
        for kind, label in (("worst", "Worst"), ("best", "Best")):
            picture = _extremes_sheet(getattr(measurement.examples, kind))
            text = "Image, reconstruction with its PSNR, and their difference times 4."
            sections.append(Section(f"{label} reconstructions by {name}", text, picture=picture))
    return render_page("Tokenizers, measured", intro, (), sections)


def _count_images(measurement: Measurement) -> str:
    counts = ", ".join(f"{count:,} of {stream}" for stream, count in measurement.num_images.items())
    return f"{counts}; {measurement.num_skipped:,} couldn't be read."


def _by_tokenizer(texts: Mapping[str, Sequence[str]]) -> str:
    """Sentences of each tokenizer, with their names where they aren't of all."""
    names: dict[str, list[str]] = {}
    for name, sentences in texts.items():
        for sentence in sentences:
            names.setdefault(sentence, []).append(name)
    return " ".join(text if len(of) == len(texts) else f"{', '.join(of)}: {text}" for text, of in names.items())


def _sizes(tokenizers: Mapping[str, Any]) -> list[list[str]]:
    header = ["tokenizer", "parameters", "step", "side", "codes an image", "codebook", "resize", "computed in", "hash"]
    rows = []
    for name, tokenizer in tokenizers.items():
        model, preprocess = tokenizer["model"], tokenizer["preprocess"]
        row = [name, f"{tokenizer['parameters']:,}", f"{tokenizer['step']:,}", str(model["resolution"])]
        row += [" × ".join(map(str, tokenizer["grid"])), f"{tokenizer['num_codes']:,} × {model['codebook_dim']}"]
        row += [f"{preprocess['mode']}, {preprocess['filter']}", tokenizer["compute_dtype"], tokenizer["hash"][:12]]
        rows.append(row)
    return [header, *rows]


def _frequencies(measurements: Mapping[str, Measurement]) -> Plot:
    series = {}
    for name, measurement in measurements.items():
        counts = np.sort(sum(measurement.counts.values()))[::-1]
        counts = counts[counts > 0]
        ranks = np.unique(np.geomspace(1, len(counts), _CURVE_POINTS).astype(int))
        series[name] = [(int(rank), float(counts[rank - 1] / counts.sum())) for rank in ranks]
    return Plot(series, "rank of the code", "share of all codes", log_y=True, log_x=True)


def _sample_sheet(measurements: Mapping[str, Measurement]) -> Pixels | None:
    """Images that all tokenizers have in their samples, by name; None without any."""
    by_name = {
        name: {(example.stream, example.key): example for example in measurement.examples.sample}
        for name, measurement in measurements.items()
    }
    first = next(iter(by_name.values()))
    images = [image for image in first if all(image in sample for sample in by_name.values())]
    if not images:
        return None
    rows = [[Cell(first[image].image, first[image].key[-_LABEL:]) for image in images]]
    rows += [
        [Cell(sample[image].decoded, f"{sample[image].psnr:.1f} dB, {name}"[:_LABEL]) for image in images]
        for name, sample in by_name.items()
    ]
    return render_sheet(rows, side=_SIDE)


def _extremes_sheet(examples: Sequence[Example]) -> Pixels:
    rows = [
        [Cell(example.image, example.key[-_LABEL:]) for example in examples],
        [Cell(example.decoded, f"{example.psnr:.1f} dB") for example in examples],
        [Cell(_magnified_difference(example), "difference x4") for example in examples],
    ]
    return render_sheet(rows, side=_SIDE)


def _magnified_difference(example: Example) -> Pixels:
    difference = np.abs(example.decoded.astype(int) - example.image)
    return np.minimum(4 * difference, 255).astype(np.uint8)
