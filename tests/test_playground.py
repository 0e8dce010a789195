"""The playground's page in a headless browser."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from tests.commands import start

pytestmark = [pytest.mark.browser, pytest.mark.slow]
WAIT = 120_000  # milliseconds: the first answer compiles its programs


@pytest.fixture(scope="module")
def address(demo):
    """Address of a running playground."""
    for name in ("gradio", "playwright"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} isn't installed: pip install '.[browser]'")
    process = start("lvm.playground", f"--model={demo / 'lvm'}", f"--tokenizer={demo / 'tokenizer'}")
    output: list[str] = []
    try:
        for line in process.stdout:
            output.append(line)
            if match := re.match(r"open (http://127\.0\.0\.1:\d+)", line):
                # Further output must not fill the pipe.
                threading.Thread(target=process.stdout.read, daemon=True).start()
                yield match[1]
                return
        pytest.fail("".join(output))
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium: $LVM_CHROMIUM, the system's, or Playwright's own."""
    sync_api = pytest.importorskip("playwright.sync_api")
    executable = os.environ.get("LVM_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        except sync_api.Error as error:
            reason = str(error).strip().splitlines()[0]
            pytest.skip(f"no Chromium can be started ({reason}); `playwright install chromium` gets one")
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    """The open page, which must not load anything from other hosts."""
    opened = browser.new_page(viewport={"width": 1360, "height": 900})
    opened.set_default_timeout(WAIT)
    requests: list[str] = []
    opened.on("request", lambda r: requests.append(r.url) if r.url.startswith("http") else None)
    opened.goto(address)
    opened.get_by_role("button", name="Answer the query").wait_for()
    yield opened
    assert [url for url in requests if not url.startswith(address)] == []
    opened.close()


def upload(page, element: str, files: list[pathlib.Path]) -> None:
    page.locator(f"#{element} input[type=file]").set_input_files(files)
    page.locator(f"#{element}").get_by_text(files[-1].stem).first.wait_for()


def answers(page) -> list[dict[str, float]]:
    """Bounding boxes of the finished answer's images."""
    page.locator("#answers img").first.wait_for()
    page.get_by_text("processing").first.wait_for(state="hidden")
    page.wait_for_function("document.querySelector('#answers img').naturalWidth > 0")
    pictures = page.locator("#answers img")
    return [pictures.nth(i).bounding_box() for i in range(pictures.count())]


def write_pictures(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
    rng, paths = np.random.default_rng(0), []
    for index in range(count):
        pixels = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        path = folder / f"picture{index}.png"
        Image.fromarray(pixels).resize((60, 40)).save(path)
        paths.append(path)
    return paths


def test_page_answers_uploaded_pairs(page, tmp_path):
    x, y, query = write_pictures(tmp_path, 3)
    upload(page, "xs", [x])
    upload(page, "ys", [y])
    upload(page, "query", [query])
    page.locator("#ask").click()
    assert len(answers(page)) >= 1
    page.locator("#prompt img").wait_for()


def test_page_continues_a_built_in_sequence(page, tmp_path):
    page.get_by_role("tab", name="Sequence").click()
    page.get_by_role("button", name="Try frames of a video").click()
    page.locator("#frames").get_by_text("scene-").first.wait_for()
    page.locator("#continue").click()
    assert len(answers(page)) >= 1


@pytest.mark.parametrize("kind", ["broken", "too many", "missing"])
def test_page_shows_upload_errors(page, tmp_path, kind):
    (good,) = write_pictures(tmp_path, 1)
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:60])
    page.get_by_role("tab", name="Sequence").click()
    messages = {"broken": "broken.png: can't be read as an image", "missing": "no frames"}
    if kind == "broken":
        upload(page, "frames", [good, broken])
    elif kind == "too many":
        upload(page, "frames", write_pictures(tmp_path, 33))
        messages[kind] = "33 frames; at most 32 at once"
    page.locator("#continue").click()
    message = page.get_by_text(messages[kind]).first
    message.wait_for()
    assert message.is_visible()


def test_page_rejects_large_files(page, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(bytes(9_000_000))
    page.get_by_role("tab", name="Sequence").click()
    page.locator("#frames input[type=file]").set_input_files(large)
    message = page.get_by_text(re.compile("exceed the maximum allowed size", re.IGNORECASE)).first
    message.wait_for()
    assert message.is_visible()
