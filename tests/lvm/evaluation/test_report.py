"""The page needs nothing beside it, and holds what it was given."""

import base64
import html.parser
import io
import re

import numpy as np
import PIL.Image

from lvm.evaluation import report
from lvm.evaluation.report import Section

PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


class Page(html.parser.HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text):
        super().__init__()
        self.references, self.tags, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in {"src", "href", "srcset", "data"}]

    def handle_data(self, data):
        self.text.append(data)


def make_page():
    chart = report.plot_curves({"loss": [(1, 2.0), (2, 1.0)]}, "step", "loss")
    sections = [Section("Answers", "what it wrote", PICTURE), Section("Loss", "while training", chart)]
    return report.render_page(
        "Title & <more>", "An <b>intro</b>", [("PSNR, x<y", "12.3 dB", "a & b")], sections
    )


def test_the_page_refers_to_nothing_outside_of_itself():
    text = make_page()
    page = Page(text)
    assert len(page.references) == 2
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not {"script", "link", "iframe"} & set(page.tags)
    without_pictures = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"http|//|@import|url\(", without_pictures)


def test_text_is_shown_as_it_was_given_and_is_no_markup():
    page = Page(make_page())
    shown = "".join(page.text)
    for text in ("Title & <more>", "An <b>intro</b>", "PSNR, x<y", "12.3 dB", "a & b", "what it wrote"):
        assert text in shown
    assert "b" not in page.tags
    assert page.tags.count("td") == 3


def test_pictures_are_embedded_whole():
    reference = Page(make_page()).references[0]
    data = base64.b64decode(reference.removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(PIL.Image.open(io.BytesIO(data)), PICTURE)


def test_equal_content_is_an_equal_page():
    assert make_page() == make_page()


def test_curves_are_pictures_that_differ_with_their_points():
    series = {"a": [(1.0, 10.0), (2.0, 100.0)]}
    charts = [
        report.plot_curves(series, "x", "y"),
        report.plot_curves(series, "x", "y", log=True),
        report.plot_curves({**series, "b": [(1.0, 20.0)]}, "x", "y"),
        report.plot_curves({}, "x", "y"),
    ]
    assert len(set(charts)) == 4
    assert all(PIL.Image.open(io.BytesIO(chart)).format == "PNG" for chart in charts)


def test_a_training_curve_takes_the_lines_that_have_the_key():
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "heldout_loss": 9.0}, {"step": 3, "loss": 1.0}]
    assert report.metric_curve(lines, "loss") == [(1, 3.0), (3, 1.0)]
    assert report.metric_curve(lines, "perplexity") == []
