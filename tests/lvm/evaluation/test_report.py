"""The HTML page is self-contained and shows figures and pictures unchanged; evaluations are not run twice."""

import datetime
import html.parser
import io
import json
import re

import numpy as np
import PIL.Image
import pytest

from lvm.common.errors import UserError
from lvm.evaluation import report
from lvm.evaluation.evaluator import Context, Evaluator, NotApplicableError
from lvm.evaluation.figures import Estimate, Figure, Picture, Plot, Published
from lvm.evaluation.plots import plot_curves
from lvm.evaluation.run import run_evaluations

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 7, 3), dtype=np.uint8)
CURVE = Plot({"loss": [(1.0, 2.0), (2.0, 1.0)]}, "step", "loss")


class Page(html.parser.HTMLParser):
    """Collects references, tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.references, self.tags, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in {"src", "href", "srcset", "data"}]

    def handle_data(self, data):
        self.text.append(data)


class Given(Evaluator):
    """Gives what it is made with."""

    needs_images = False

    def __init__(self, result=None, error=None, every=0):
        self.__dict__.update(result=result, error=error, runs=0, every=every)

    def run(self, context):
        self.__dict__["runs"] += 1
        if self.error is not None:
            raise self.error
        return self.result


def results_of(figures=(), pictures=()):
    return list(figures), list(pictures)


FIGURE = Figure(
    "iou|a<b", Estimate(0.8, np.repeat([0.7, 0.9], 20)), "a & b", "", True,
    {"copied": Estimate(0.25, np.repeat([0.2, 0.3], 20))},
    Estimate(0.95), Published(0.4894, "different data"),
)  # fmt: skip


def new_evaluations():
    pictures = [Picture("Answers, given", "generated", PIXELS), Picture("Loss", "during training", CURVE)]
    return {
        "first": Given(results_of([FIGURE], pictures)),
        "second_one": Given(results_of([Figure("psnr", Estimate(12.34), "x", "dB", None)])),
        "third": Given(error=NotApplicableError("no depth here")),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory, make_context):
    """The folder of a report of `new_evaluations`, and its results."""
    folder = tmp_path_factory.mktemp("report")
    records = run_evaluations(new_evaluations(), make_context([], {}), folder, {"model": 1})
    results = report.collect_results({"model": 1}, records)
    report.write_report(folder, results, records)
    return folder, results


@pytest.fixture
def run(tmp_path, make_context):
    """(evaluations, request) → records, in a folder."""
    return lambda evaluations, request: run_evaluations(evaluations, make_context([], {}), tmp_path, request)


def test_results_are_what_evaluators_return(written):
    folder, results = written
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["figures"]["first"]["iou|a<b"]["value"] == pytest.approx(0.8)
    assert results["figures"]["second_one"]["psnr"]["unit"] == "dB"
    assert results["skipped"] == {"third": "no depth here"}
    assert results["plots"]["first"]["Loss"]["x_label"] == "step"
    with np.load(folder / "evaluations" / "first.npz") as resamples:
        assert set(resamples) == {"iou|a<b", "iou|a<b|copied"}
        np.testing.assert_allclose(np.percentile(resamples["iou|a<b"], [2.5, 97.5]), [0.7, 0.9], rtol=1e-6)
    picture = PIL.Image.open(folder / "pictures" / "first-answers-given.png")
    np.testing.assert_array_equal(picture, PIXELS)


def test_finished_evaluations_are_not_run_again(run):
    evaluations = new_evaluations()
    run(evaluations, {"model": 1})
    run(evaluations, {"model": 1})
    assert [evaluator.runs for evaluator in evaluations.values()] == [1, 1, 1]
    run(evaluations, {"model": 2})
    assert [evaluator.runs for evaluator in evaluations.values()] == [2, 2, 2]


def test_interrupted_run_goes_on_where_it_ended(run):
    evaluations = new_evaluations()
    broken = {**evaluations, "third": Given(error=UserError("shots=9: use fewer"))}
    with pytest.raises(UserError, match=r"^config\.evaluations\.third: shots=9: use fewer$"):
        run(broken, {})
    run(evaluations, {})
    assert [evaluator.runs for evaluator in evaluations.values()] == [1, 1, 1]


def test_page_has_no_external_references(written):
    text = (written[0] / "index.html").read_text()
    page = Page(text)
    assert len(page.references) == 2
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not {"script", "link", "iframe"} & set(page.tags)
    without_pictures = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"http|//|@import|url\(", without_pictures)
    assert str(datetime.date.today().year) not in without_pictures


def test_page_shows_figures_with_intervals_and_baselines(written):
    page = Page((written[0] / "index.html").read_text())
    content = "|".join(page.text)
    row = (
        "iou|a<b|0.800|0.700 – 0.900|copied 0.250 (0.200 – 0.300)|0.950|0.489 (different data)|a & b; higher is better"
    )
    assert row in content
    assert "psnr|12.3 dB|x" in content
    assert "second one" in content
    assert "third: no depth here" in content
    assert "b" not in page.tags


def test_overview_shows_the_pictures(written):
    assert PIL.Image.open(written[0] / "pictures" / "overview.webp").size == (7, 60)


def test_metrics_table_names_the_evaluation(written):
    rows = report.metrics_table(written[1])
    assert rows[0] == ("first: iou|a<b", "0.800", "95 % 0.700 – 0.900; copied 0.250 (0.200 – 0.300)")
    assert rows[1] == ("second_one: psnr", "12.3 dB", "")


def test_plot_depends_on_points_bands_and_scale():
    series = {"a": [(1.0, 10.0), (2.0, 100.0)]}
    charts = [
        plot_curves(Plot(series, "x", "y")),
        plot_curves(Plot(series, "x", "y", log_y=True)),
        plot_curves(Plot({**series, "b": [(1.0, 20.0)]}, "x", "y")),
        plot_curves(Plot({"a": [(1.0, 10.0, 5.0, 15.0), (2.0, 100.0, 50.0, 120.0)]}, "x", "y")),
        plot_curves(Plot({}, "x", "y")),
    ]
    assert len(set(charts)) == 5
    images = [PIL.Image.open(io.BytesIO(chart)) for chart in charts]
    assert all(image.format == "PNG" and set(image.info) <= {"Software", "dpi"} for image in images)


def test_context_needs_a_source_for_images(make_context):
    context = make_context([], {})
    bare = Context(context.model, context.tokenizer, context.mixture)
    with pytest.raises(UserError, match="no image source"):
        _ = bare.heldout
