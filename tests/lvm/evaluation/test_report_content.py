"""The report's table, sections and files."""

import json

import numpy as np
import PIL.Image
import pytest

from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Pairs, Single, Video
from lvm.evaluation import prompted, report
from lvm.evaluation.heldout import Heldout
from lvm.evaluation.report import Section
from lvm.inference.pretrained import LVM

RESULTS = {
    "request": {},
    "heldout_scenes": 12,
    "tokenizer": {
        "psnr": {"rgb": 23.456, "depth": 30.0},
        "round_trip_pixel_accuracy": 0.987,
        "round_trip_foreground_iou": 0.9123,
        "num_codes_counted": 123456,
        "codebook_usage": 0.5,
        "codebook_perplexity": 321.4,
    },
    "likelihood": {
        "mixture": {
            "loss": 3.21,
            "unigram_entropy": 6.42,
            "below_unigram": 0.5,
            "by_component": {"video": 3.21},
        },
        "perplexity_by_image": {"video": {"exp_of_mean": [30.0, 20.0, 10.0], "mean_of_exp": [31.0, 21.0, 11.0]}},
        "video": {
            "loss_first_image": 4.0,
            "loss_from_image_3": 2.5,
            "conditional_entropy": 3.125,
            "conditional_entropy_plug_in": 3.0,
            "num_transitions": 12345,
            "below_conditional": 0.2,
            "perplexity_ratio": 0.22,
        },
    },
    "prompted": {
        "segmentation": {
            "num_queries": 64,
            "psnr": 18.0,
            "psnr_copy_baseline": 9.0,
            "pixel_accuracy": 0.9,
            "pixel_accuracy_copy_baseline": 0.6,
            "class_miou": 0.7,
            "class_miou_chance": 0.25,
            "foreground_iou": 0.8,
            "foreground_iou_ci95": [0.75, 0.85],
            "foreground_iou_all_foreground": 0.3,
            "foreground_iou_copy_baseline": 0.2,
        },
        "depth": {
            "num_queries": 64,
            "psnr": 17.0,
            "psnr_copy_baseline": 8.0,
            "rmse": 0.5,
            "abs_rel": 0.123,
            "delta1": 0.9,
        },
    },
    "task_following": {
        "by_codes": {"all": 0.95, "segmentation": 0.9, "depth": 1.0},
        "by_pixels": {"all": 0.7, "segmentation": 0.5, "depth": 0.9},
        "judge_accuracy": 0.99,
    },
}


def lines(results=RESULTS):
    return [" | ".join(row) for row in report.metrics_table(results)]


@pytest.mark.parametrize(
    "line",
    [
        "PSNR, rgb | 23.5 dB | reconstruction",
        "segmentation round trip | 98.7% | pixel accuracy after decoding",
        "segmentation round trip | 0.912 | foreground IoU after decoding",
        "codebook usage | 50.0% | of 123,456 codes",
        "codebook perplexity | 321 | of the same codes",
        "next-token loss | 3.210 nats | 50.0% below the unigram entropy of the same codes, 6.420",
        "video loss, from image 3 | 2.500 nats | 20.0% below the entropy given the same position of the preceding "
        "frame, 3.125 (of 12,345 codes; plug-in 3.000)",
        "perplexity, from image 3 | 0.22× | that of the first image",
        "segmentation by prompt | 0.800 | foreground IoU of 64 queries, 95 % CI 0.750 to 0.850; all foreground "
        "0.300, copy baseline 0.200",
        "segmentation by prompt | 0.700 | class mIoU; chance level 0.250",
        "segmentation by prompt | 90.0% | pixel accuracy; copy baseline 60.0%",
        "segmentation by prompt | 18.0 dB | PSNR; copy baseline 9.0 dB",
        "depth by prompt | 0.123 | AbsRel; δ1 90.0%, RMSE 0.5",
        "task following | 95.0% | task-following accuracy by codes (segmentation 90%, depth 100%); the classifier's "
        "accuracy is 99.0%",
        " | 70.0% | task-following accuracy by pixels",
    ],
)
def test_metrics_table_has_units_and_baselines(line):
    assert line in lines()


def test_metrics_table_omits_what_was_not_measured():
    tokenizer = {"psnr": {}, "num_codes_counted": 0, "codebook_usage": 0.0, "codebook_perplexity": 1.0}
    rows = lines({"tokenizer": tokenizer, "likelihood": {}, "prompted": {}})
    assert [row.split(" | ")[0] for row in rows] == ["codebook usage", "codebook perplexity"]


def test_write_report_writes_page_pictures_and_results(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    picture = np.full((3, 4, 3), 9, np.uint8)
    sections = [Section("Video, continued", "frames", picture)]
    out = tmp_path / "out"
    report.write_report(out, RESULTS, sections, str(tmp_path / "model"), str(tmp_path / "no tokenizer"))
    np.testing.assert_array_equal(PIL.Image.open(out / "pictures" / "video-continued.png"), picture)
    assert json.loads((out / "results.json").read_text()) == RESULTS
    page = (out / "index.html").read_text()
    for text in ("12 held-out scenes", "23.5 dB", "Perplexity against context", "Loss of the model"):
        assert text in page
    assert "Loss of the tokenizer" not in page


class CopyLast(LVM):
    """A model that repeats the last image of the prompt."""

    def __init__(self):
        pass

    def generate(self, grids, num_images, temperature):
        assert temperature == 0
        return np.repeat(np.asarray(grids)[:, -1:], num_images, axis=1)


class FakeHeldout(Heldout):
    codecs = {"rgb": None, "segmentation": None, "depth": None}  # noqa: RUF012

    def __init__(self, scenes):
        self.scenes = scenes


def test_make_sections_of_videos_tasks_and_reconstructions(make_heldout_scenes, exact_codec):
    scenes, (_, decode) = make_heldout_scenes(4), exact_codec
    queries = prompted.make_queries(scenes, 12, 2, seed=0)
    answer = lambda prompts, num_images: prompts[:, -1:]  # noqa: E731
    tasks = [prompted.answer_queries(queries, "rgb", "segmentation", answer, decode)]
    components = {
        "clips": ComponentConfig(Video(frames=2, strides=(1,))),
        "pairs": ComponentConfig(Pairs()),
        "single": ComponentConfig(Single()),
        "unseen": ComponentConfig(Video()),
    }
    clips = np.stack([scene.codes[:, 0] for scene in scenes])
    sections = report.make_sections(
        CopyLast(),
        MixtureConfig(components),
        FakeHeldout(scenes),
        decode,
        tasks,
        {"clips": clips, "single": clips[:, :1]},
    )
    titles = [section.title for section in sections]
    assert titles == ["Video, continued", "Segmentation, by example", "Reconstructions"]
    assert "first 1 frames" in sections[0].text
    assert "2 example pairs" in sections[1].text
    assert all(section.picture.dtype == np.uint8 and section.picture.ndim == 3 for section in sections)
