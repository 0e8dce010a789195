"""Self-contained HTML pages."""

import base64
import io
import re

import numpy as np
import PIL.Image
import pytest

from lvm.common.page import Section, render_page
from lvm.common.png import encode_png

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("picture", [PIXELS, encode_png(PIXELS)])
def test_page_embeds_a_picture_losslessly(picture):
    page = render_page("Title", "", (), [Section("x", picture=picture)])
    (data,) = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    np.testing.assert_array_equal(PIL.Image.open(io.BytesIO(base64.b64decode(data))), PIXELS)


def test_page_escapes_all_text():
    section = Section("a<b", "c<d", [("e<f",), ("g<h",)], PIXELS, [("i<j",), ("k<l",)])
    page = render_page("m<n", "o<p", [("q<r", "", "s<t")], [section])
    assert not re.search(r"\w<\w", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    assert len(set(re.findall(r"\w&lt;\w", page))) == 10


def test_page_leaves_out_what_is_empty():
    section = Section("x", metrics=[("name", "value", "meaning"), ("loss", "1", ""), ("psnr", "2", "")], level=3)
    page = render_page("Title", "intro", (), [section])
    assert '<h3>x</h3><div class="wide"><table><tr><th>name</th><th>value</th></tr>' in page
    assert "<tr><td>loss</td><td>1</td></tr>" in page
    assert "Metrics" not in page
    assert page.count("<p>") == 1
