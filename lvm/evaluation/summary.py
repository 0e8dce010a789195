"""The evaluation's page: which figures and pictures it shows, in which words."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from lvm.common import files
from lvm.common.png import encode_png
from lvm.data.mixture.mixture import MixtureConfig
from lvm.data.mixture.recipes import Video
from lvm.evaluation import report
from lvm.evaluation.heldout import Heldout
from lvm.evaluation.prompted import Answers
from lvm.inference.contact_sheet import Cell, answer_row, crop_rows, render_sheet
from lvm.inference.pretrained import LVM
from lvm.training import metrics as training_metrics

DecodeFn = Callable[[np.ndarray], np.ndarray]
_SHOWN = 5  # rows of answers in a picture
_VIDEOS = 4


def make_sections(
    model: LVM,
    mixture: MixtureConfig,
    heldout: Heldout,
    decode: DecodeFn,
    asked: Sequence[Answers],
    sentences: Mapping[str, np.ndarray],
) -> list[report.Section]:
    """The pictures of an evaluation, prompts' answers first."""
    videos = [
        _video(model, sentences[name], decode)
        for name, part in mixture.components.items()
        if isinstance(part.recipe, Video) and name in sentences
    ]
    tasks = [_task(answers) for answers in asked]
    return [*videos, *tasks, _reconstructions(heldout, decode)]


def _video(model: LVM, sentences: np.ndarray, decode: DecodeFn) -> report.Section:
    shown = sentences[:: max(1, len(sentences) // _VIDEOS)][:_VIDEOS]  # [videos, frames, N]
    given = max(1, min(shown.shape[1] // 2, shown.shape[1] - 1))
    answers = model.generate(shown[:, :given], shown.shape[1] - given, temperature=0.0)
    rows: list[Sequence[Cell | None]] = []
    for truth, answer in zip(shown, answers, strict=True):
        frames = [Cell(image, f"frame {i + 1}") for i, image in enumerate(decode(truth))]
        rows += [frames, answer_row(given, decode(answer))]
    text = (
        f"The first {given} frames are the prompt. Above: what came next, through the tokenizer. "
        "Below, framed: what the model wrote."
    )
    return report.Section("Video, continued", text, render_sheet(rows))


def _task(answers: Answers) -> report.Section:
    shown = range(0, len(answers.queries), max(1, len(answers.queries) // _SHOWN))
    rows = []
    for number in list(shown)[:_SHOWN]:
        query = answers.queries[number]
        row = []
        for scene, frame in query.examples:
            row.append(Cell(scene.image(frame, answers.input_stream), answers.input_stream))
            row.append(Cell(scene.image(frame, answers.target_stream), answers.target_stream))
        row.append(Cell(query.scene.image(query.frame, answers.input_stream), "query"))
        row.append(Cell(answers.images[number], "answer", True))
        row.append(Cell(answers.truth[number], "truth"))
        rows.append(row)
    pairs = len(answers.queries[0].examples)
    text = f"{pairs} example pairs and a query are the prompt; nothing names the task."
    return report.Section(
        f"{answers.target_stream.capitalize()}, by example".replace("_", " "), text, render_sheet(rows)
    )


def _reconstructions(heldout: Heldout, decode: DecodeFn) -> report.Section:
    rows = []
    for stream in heldout.codecs:
        scenes = heldout.with_streams([stream])[:8]
        if scenes:
            rows.append([Cell(scene.image(0, stream), stream) for scene in scenes])
            rows.append([Cell(x, "decoded") for x in decode(np.stack([s.grid(0, stream) for s in scenes]))])
    text = "Held-out images above what the tokenizer makes of their codes."
    return report.Section("Reconstructions", text, render_sheet(rows, side=80))


def write_report(
    out: epath.PathLike,
    results: Mapping[str, Any],
    sections: Sequence[report.Section],
    model_folder: str,
    tokenizer_folder: str,
) -> None:
    """Writes the pictures, an overview of them, `index.html` and, last, `results.json`, by which all is there."""
    folder = epath.Path(out)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for section in sections:
        name = section.title.lower().replace(",", "").replace(" ", "-")
        data = section.picture if isinstance(section.picture, bytes) else encode_png(section.picture)
        files.write_atomically(folder / "pictures" / f"{name}.png", data)
    answered = sections[:-1] or sections  # the last one shows reconstructions
    drawn = [section.picture for section in answered if isinstance(section.picture, np.ndarray)]
    overview = io.BytesIO()
    Image.fromarray(crop_rows(drawn)).save(overview, format="WEBP", quality=85)
    files.write_atomically(folder / "pictures" / "overview.webp", overview.getvalue())
    charts = _charts(results, model_folder, tokenizer_folder)
    intro = (
        f"{results['heldout_scenes']} held-out scenes. Every image is a grid of codes; "
        "a prompt is a list of images, and the answer is the codes that the model writes next."
    )
    text = report.render_page(
        "A large vision model, evaluated", intro, metrics_table(results), [*sections, *charts]
    )
    files.write_atomically(folder / "index.html", text.encode())
    files.write_json(folder / "results.json", results)


def _charts(results: Mapping[str, Any], model_folder: str, tokenizer_folder: str) -> list[report.Section]:
    charts = []
    by_image = results["likelihood"].get("perplexity_by_image", {})
    if by_image:
        values = {name: list(enumerate(lists["exp_of_mean"], 1)) for name, lists in by_image.items()}
        chart = report.plot_curves(values, "image of the sentence", "perplexity of its codes", log=True)
        text = "How well each image's codes are foretold by the images before it."
        charts.append(report.Section("Perplexity against context", text, chart))
    for title, folder in (("the model", model_folder), ("the tokenizer", tokenizer_folder)):
        lines = training_metrics.read_metrics(folder)
        keys = [key for key in ("loss", "heldout_loss") if any(key in line for line in lines)]
        series = {key: report.metric_curve(lines, key) for key in keys}
        if series:
            text = "Logged while training; " + (
                "in nats a code." if title == "the model" else "weighted sum."
            )
            charts.append(
                report.Section(f"Loss of {title}", text, report.plot_curves(series, "step", "loss"))
            )
    return charts


def metrics_table(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures as rows of (name, value, meaning)."""
    return [
        *_tokenizer_rows(results["tokenizer"]),
        *_likelihood_rows(results["likelihood"]),
        *_task_rows(results),
    ]


def _tokenizer_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = [(f"PSNR, {name}", f"{value:.1f} dB", "reconstruction") for name, value in figures["psnr"].items()]
    if "round_trip_foreground_iou" in figures:
        rows.append(
            (
                "segmentation round trip",
                f"{figures['round_trip_foreground_iou']:.3f}",
                "foreground IoU after decoding",
            )
        )
    if "round_trip_pixel_accuracy" in figures:
        value = f"{figures['round_trip_pixel_accuracy']:.1%}"
        rows.append(("segmentation round trip", value, "pixels of the right class after decoding"))
    rows.append(
        ("codebook usage", f"{figures['codebook_usage']:.1%}", f"of {figures['num_codes_counted']:,} codes")
    )
    rows.append(("codebook perplexity", f"{figures['codebook_perplexity']:.0f}", "of the same codes"))
    return rows


def _likelihood_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if not figures:
        return []
    mixture = figures["mixture"]
    text = f"{_share(mixture['below_unigram'])} below the unigram entropy of the same codes, "
    rows = [("next-code loss", f"{mixture['loss']:.3f} nats", text + f"{mixture['unigram_entropy']:.3f}")]
    if "video" in figures:
        video = figures["video"]
        text = (
            f"{_share(video['below_conditional'])} below the entropy given the same place of the frame before, "
            f"{video['conditional_entropy']:.3f} (of {video['num_transitions']:,} codes; plug-in "
            f"{video['conditional_entropy_plug_in']:.3f})"
        )
        rows.append(("video loss, images 3 on", f"{video['loss_from_image_3']:.3f} nats", text))
        rows.append(
            ("perplexity, images 3 on", f"{video['perplexity_ratio']:.2f}×", "that of the first image")
        )
    return rows


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _task_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for target, figures in results["prompted"].items():
        name = f"{target} by prompt"
        if "foreground_iou" in figures:
            low, high = figures["foreground_iou_ci95"]
            text = (
                f"foreground IoU of {figures['num_queries']} queries, 95 % in {low:.3f} to {high:.3f}; everything "
                f"{figures['foreground_iou_all_foreground']:.3f}, copying an example "
                f"{figures['foreground_iou_copy_baseline']:.3f}"
            )
            rows.append((name, f"{figures['foreground_iou']:.3f}", text))
        if "class_miou" in figures:
            text = f"class mIoU; classes by lot {figures['class_miou_chance']:.3f}"
            rows.append((name, f"{figures['class_miou']:.3f}", text))
            text = (
                f"pixels of the right class; copying an example {figures['pixel_accuracy_copy_baseline']:.1%}"
            )
            rows.append((name, f"{figures['pixel_accuracy']:.1%}", text))
        if "abs_rel" in figures:
            text = f"AbsRel; δ1 {figures['delta1']:.1%}, RMSE {figures['rmse']:.3g}"
            rows.append((name, f"{figures['abs_rel']:.3f}", text))
        rows.append(
            (
                name,
                f"{figures['psnr']:.1f} dB",
                f"PSNR; copying an example {figures['psnr_copy_baseline']:.1f} dB",
            )
        )
    if "task_following" in results:
        following = results["task_following"]
        shares = {key: value for key, value in following["by_codes"].items() if key != "all"}
        each = ", ".join(f"{key} {value:.0%}" for key, value in shares.items())
        text = (
            f"answers of the stream that the examples show, by their codes ({each}); this judge is right on "
            f"{following['judge_accuracy']:.1%} of true images"
        )
        rows.append(("task following", f"{following['by_codes']['all']:.1%}", text))
        text = "answers nearest, in pixels, to the query's true image of that stream"
        rows.append(("", f"{following['by_pixels']['all']:.1%}", text))
    return rows
