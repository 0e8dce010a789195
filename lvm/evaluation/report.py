"""Report of an evaluation: a self-contained HTML page with the table of metrics, pictures and curves."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from PIL import Image

from lvm.common import files
from lvm.common.page import Row, Section, figure_png, render_page
from lvm.data.mixture.mixture import MixtureConfig
from lvm.data.mixture.recipes import Video
from lvm.evaluation.heldout import Heldout
from lvm.evaluation.likelihood import Sentences
from lvm.evaluation.prompted import Answers, DecodeFn
from lvm.inference.contact_sheet import Cell, answer_row, crop_rows, render_sheet
from lvm.inference.pretrained import LVM
from lvm.training.metrics import read_metrics

_MAX_QUERIES, _MAX_VIDEOS, _MAX_SCENES = 5, 4, 8  # in a picture


def make_sections(
    model: LVM,
    mixture: MixtureConfig,
    heldout: Heldout,
    decode: DecodeFn,
    tasks: Sequence[Answers],
    sentences: Mapping[str, Sentences],
) -> list[Section]:
    """Pictures of continued videos, answered queries and reconstructions, in this order."""
    videos = [
        _video_section(model, sentences[name], decode)
        for name, component in mixture.components.items()
        if isinstance(component.recipe, Video) and name in sentences
    ]
    return [*videos, *map(_task_section, tasks), _reconstruction_section(heldout, decode)]


def _video_section(model: LVM, sentences: np.ndarray, decode: DecodeFn) -> Section:
    videos = sentences[:: max(1, len(sentences) // _MAX_VIDEOS)][:_MAX_VIDEOS]  # [videos, frames, N]
    length = videos.shape[1]
    prompt = max(1, min(length // 2, length - 1))
    answers = model.generate(videos[:, :prompt], length - prompt, temperature=0.0)
    rows: list[Sequence[Cell | None]] = []
    for truth, answer in zip(videos, answers, strict=True):
        frames = [Cell(image, f"frame {i + 1}") for i, image in enumerate(decode(truth))]
        rows += [frames, answer_row(prompt, decode(answer))]
    text = (
        f"The first {prompt} frames are the prompt. Above: the true frames, through the tokenizer. "
        "Below, framed: the model's continuation."
    )
    return Section("Video, continued", text, render_sheet(rows))


def _task_section(task: Answers) -> Section:
    rows = []
    for index in range(0, len(task.queries), max(1, len(task.queries) // _MAX_QUERIES))[:_MAX_QUERIES]:
        query = task.queries[index]
        streams = (task.input_stream, task.target_stream)
        rows.append(
            [
                *(Cell(scene.image(frame, s), s) for scene, frame in query.examples for s in streams),
                Cell(query.scene.image(query.frame, task.input_stream), "query"),
                Cell(task.images[index], "answer", True),
                Cell(task.truth[index], "truth"),
            ]
        )
    text = f"{len(task.queries[0].examples)} example pairs and a query are the prompt; nothing names the task."
    title = f"{task.target_stream.capitalize()}, by example".replace("_", " ")
    return Section(title, text, render_sheet(rows))


def _reconstruction_section(heldout: Heldout, decode: DecodeFn) -> Section:
    rows = []
    for stream in heldout.codecs:
        if scenes := heldout.with_streams([stream])[:_MAX_SCENES]:
            rows.append([Cell(scene.image(0, stream), stream) for scene in scenes])
            rows.append([Cell(x, "decoded") for x in decode(np.stack([s.grid(0, stream) for s in scenes]))])
    return Section(
        "Reconstructions", "Held-out images above their reconstructions by the tokenizer.", render_sheet(rows, side=80)
    )


def write_report(
    out: epath.PathLike,
    results: Mapping[str, Any],
    sections: Sequence[Section],
    model_folder: str,
    tokenizer_folder: str,
) -> None:
    """Writes pictures, an overview of them, `index.html` and, last, `results.json`: it marks a complete evaluation."""
    folder = epath.Path(out)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for section in sections:
        name = section.title.lower().replace(",", "").replace(" ", "-")
        files.write_atomically(folder / "pictures" / f"{name}.png", section.png)
    answered = sections[:-1] or sections  # without the reconstructions
    sheets = [section.picture for section in answered if isinstance(section.picture, np.ndarray)]
    overview = io.BytesIO()
    Image.fromarray(crop_rows(sheets)).save(overview, format="WEBP", quality=85)
    files.write_atomically(folder / "pictures" / "overview.webp", overview.getvalue())
    intro = (
        f"{results['heldout_scenes']} held-out scenes. Every image is a grid of codes; "
        "a prompt is a list of images, and the answer is the codes that the model generates next."
    )
    sections = [*sections, *_charts(results, model_folder, tokenizer_folder)]
    page = render_page("A large vision model, evaluated", intro, metrics_table(results), sections)
    files.write_atomically(folder / "index.html", page.encode())
    files.write_json(folder / "results.json", results)


def _charts(results: Mapping[str, Any], model_folder: str, tokenizer_folder: str) -> list[Section]:
    charts = []
    if by_image := results["likelihood"].get("perplexity_by_image", {}):
        perplexities = {name: list(enumerate(lists["exp_of_mean"], 1)) for name, lists in by_image.items()}
        chart = plot_curves(perplexities, "image of the sentence", "perplexity of its codes", log_y=True)
        text = "Per-image perplexity given the preceding images."
        charts.append(Section("Perplexity against context", text, chart))
    for name, unit, folder in (
        ("model", "in nats per code", model_folder),
        ("tokenizer", "weighted sum", tokenizer_folder),
    ):
        records = read_metrics(folder)
        curves = {key: metric_curve(records, key) for key in ("loss", "heldout_loss")}
        if curves := {key: points for key, points in curves.items() if points}:
            chart = plot_curves(curves, "step", "loss")
            charts.append(Section(f"Loss of the {name}", f"Logged during training; {unit}.", chart))
    return charts


def metrics_table(results: Mapping[str, Any]) -> list[Row]:
    """Rows (name, value, meaning) of the metrics in `results.json`."""
    tasks = [row for target, scores in results["prompted"].items() for row in _task_rows(target, scores)]
    following = _task_following_rows(results["task_following"]) if "task_following" in results else []
    likelihood = _likelihood_rows(results["likelihood"]) if results["likelihood"] else []
    return [*_tokenizer_rows(results["tokenizer"]), *likelihood, *tasks, *following]


def _tokenizer_rows(m: Mapping[str, Any]) -> list[Row]:
    rows = [(f"PSNR, {name}", f"{value:.1f} dB", "reconstruction") for name, value in m["psnr"].items()]
    name = "segmentation round trip"
    if "round_trip_foreground_iou" in m:
        rows.append((name, f"{m['round_trip_foreground_iou']:.3f}", "foreground IoU after decoding"))
    if "round_trip_pixel_accuracy" in m:
        rows.append((name, f"{m['round_trip_pixel_accuracy']:.1%}", "pixel accuracy after decoding"))
    return [
        *rows,
        ("codebook usage", f"{m['codebook_usage']:.1%}", f"of {m['num_codes_counted']:,} codes"),
        ("codebook perplexity", f"{m['codebook_perplexity']:.0f}", "of the same codes"),
    ]


def _likelihood_rows(results: Mapping[str, Any]) -> list[Row]:
    m = results["mixture"]
    text = f"{_percent(m['below_unigram'])} below the unigram entropy of the same codes, {m['unigram_entropy']:.3f}"
    rows = [("next-token loss", f"{m['loss']:.3f} nats", text)]
    if "video" in results:
        m = results["video"]
        text = (
            f"{_percent(m['below_conditional'])} below the entropy given the same position of the preceding frame, "
            f"{m['conditional_entropy']:.3f} (of {m['num_transitions']:,} codes; plug-in "
            f"{m['conditional_entropy_plug_in']:.3f})"
        )
        rows.append(("video loss, from image 3", f"{m['loss_from_image_3']:.3f} nats", text))
        rows.append(("perplexity, from image 3", f"{m['perplexity_ratio']:.2f}×", "that of the first image"))
    return rows


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _task_rows(target: str, m: Mapping[str, Any]) -> list[Row]:
    values = []
    if "foreground_iou" in m:
        low, high = m["foreground_iou_ci95"]
        text = (
            f"foreground IoU of {m['num_queries']} queries, 95 % CI {low:.3f} to {high:.3f}; all foreground "
            f"{m['foreground_iou_all_foreground']:.3f}, copy baseline {m['foreground_iou_copy_baseline']:.3f}"
        )
        values.append((f"{m['foreground_iou']:.3f}", text))
    if "class_miou" in m:
        values.append((f"{m['class_miou']:.3f}", f"class mIoU; chance level {m['class_miou_chance']:.3f}"))
        text = f"pixel accuracy; copy baseline {m['pixel_accuracy_copy_baseline']:.1%}"
        values.append((f"{m['pixel_accuracy']:.1%}", text))
    if "abs_rel" in m:
        values.append((f"{m['abs_rel']:.3f}", f"AbsRel; δ1 {m['delta1']:.1%}, RMSE {m['rmse']:.3g}"))
    values.append((f"{m['psnr']:.1f} dB", f"PSNR; copy baseline {m['psnr_copy_baseline']:.1f} dB"))
    return [(f"{target} by prompt", *value) for value in values]


def _task_following_rows(m: Mapping[str, Any]) -> list[Row]:
    by_target = ", ".join(f"{key} {share:.0%}" for key, share in m["by_codes"].items() if key != "all")
    text = f"task-following accuracy by codes ({by_target}); the classifier's accuracy is {m['judge_accuracy']:.1%}"
    return [
        ("task following", f"{m['by_codes']['all']:.1%}", text),
        ("", f"{m['by_pixels']['all']:.1%}", "task-following accuracy by pixels"),
    ]


def plot_curves(
    series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, log_y: bool = False
) -> bytes:
    """Plots name → points (x, y) as lines, as PNG."""
    figure = Figure(figsize=(7.2, 3.2), dpi=120)
    axes = figure.subplots()
    for name, points in series.items():
        x, y = zip(*points, strict=True)
        axes.plot(x, y, label=name, marker="o" if len(points) < 20 else None, linewidth=1.4, markersize=4)
    axes.set(xlabel=x_label, ylabel=y_label, yscale="log" if log_y else "linear")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if series:
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure_png(figure)


def metric_curve(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the records of a `metrics.jsonl` that have the key."""
    return [(float(record["step"]), float(record[key])) for record in records if key in record]
