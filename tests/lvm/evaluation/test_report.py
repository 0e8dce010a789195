"""The HTML report is self-contained and shows its content unchanged."""

import base64
import datetime
import html.parser
import io
import re

import numpy as np
import PIL.Image

from lvm.evaluation import report
from lvm.evaluation.report import Section

PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


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


def render():
    chart = report.plot_curves({"loss": [(1.0, 2.0), (2.0, 1.0)]}, "step", "loss")
    sections = [Section("Answers", "generated", PICTURE), Section("Loss", "during training", chart)]
    table = [("PSNR, x<y", "12.3 dB", "a & b")]
    return report.render_page("Title & <more>", "An <b>intro</b>", table, sections)


def test_page_has_no_external_references():
    text = render()
    page = Page(text)
    assert len(page.references) == 2
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not {"script", "link", "iframe"} & set(page.tags)
    without_pictures = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"http|//|@import|url\(", without_pictures)


def test_page_escapes_text():
    page = Page(render())
    content = "".join(page.text)
    for text in ("Title & <more>", "An <b>intro</b>", "PSNR, x<y", "12.3 dB", "a & b", "generated"):
        assert text in content
    assert "b" not in page.tags
    assert page.tags.count("td") == 3


def test_page_embeds_pictures_losslessly():
    reference = Page(render()).references[0]
    data = base64.b64decode(reference.removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(PIL.Image.open(io.BytesIO(data)), PICTURE)


def test_page_has_no_date():
    text = render()
    chart = Page(text).references[1].removeprefix("data:image/png;base64,")
    assert set(PIL.Image.open(io.BytesIO(base64.b64decode(chart))).info) <= {"Software", "dpi"}
    assert str(datetime.date.today().year) not in re.sub(r'src="data:[^"]*"', "", text)


def test_plot_curves_depends_on_points_and_scale():
    series = {"a": [(1.0, 10.0), (2.0, 100.0)]}
    charts = [
        report.plot_curves(series, "x", "y"),
        report.plot_curves(series, "x", "y", log_y=True),
        report.plot_curves({**series, "b": [(1.0, 20.0)]}, "x", "y"),
        report.plot_curves({}, "x", "y"),
    ]
    assert len(set(charts)) == 4
    assert all(PIL.Image.open(io.BytesIO(chart)).format == "PNG" for chart in charts)


def test_metric_curve_takes_the_records_with_the_key():
    records = [{"step": 1, "loss": 3.0}, {"step": 2, "heldout_loss": 9.0}, {"step": 3, "loss": 1.0}]
    assert report.metric_curve(records, "loss") == [(1, 3.0), (3, 1.0)]
    assert report.metric_curve(records, "perplexity") == []
