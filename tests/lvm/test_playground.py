"""The playground's session; tests/test_playground.py drives the page."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lvm import playground
from lvm.common import errors
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.inference.generator import SamplingParams
from lvm.inference.pretrained import LVM
from lvm.playground import PlaygroundSession, write_examples
from tokenizer import Tokenizer

SIDE, GRID = 16, (2, 2)


class FakeTokenizer(Tokenizer):
    config = SimpleNamespace(grid=GRID, resolution=SIDE)
    preprocess = Preprocess(SIDE)
    codes_per_image = 4

    def __init__(self):
        pass

    def read(self, path):
        try:
            return self.preprocess(Image.open(path))
        except OSError as error:
            raise UserError(f"{path}: can't be read as an image") from error

    def encode(self, images):
        return np.zeros((len(images), 4), np.int32)

    def decode(self, codes):
        return np.zeros((len(codes), SIDE, SIDE, 3), np.uint8)


class FakeModel(LVM):
    """Generates two codes at a time."""

    def __init__(self):
        pass

    def max_images(self, codes_per_image):
        return 6

    def check_fits(self, num_images, codes_per_image):
        if num_images > 5:
            raise UserError("holds 6 images")

    def stream(self, grids, num_images, candidates, sampling, seed, every):
        for count in range(2, 4 * num_images + 1, 2):
            yield np.zeros((1, candidates, count), np.int32)


@pytest.fixture
def session():
    return PlaygroundSession(FakeModel(), FakeTokenizer())


@pytest.fixture
def examples(tmp_path):
    return write_examples(tmp_path, FakeTokenizer(), max_images=6)


def test_examples_fit_the_context(session, examples):
    images, answers, (query,) = examples["segmentation"]
    prompt = session.pairs(images, answers, query)
    assert prompt.labels == ("x1", "y1", "x2", "y2", "query")
    assert len(session.sequence(*examples["video"]).images) == 3


def test_answer_is_gray_where_codes_are_missing(session, examples):
    prompt = session.sequence(*examples["video"])
    (_, initial), *steps = session.answer(prompt, 2, 3, SamplingParams(), 0)
    assert initial == []
    assert [len(answers) for _, answers in steps] == [3, 3, 6, 6]  # images of three candidates
    shares = [np.mean([image == 225 for image, _ in answers]) for _, answers in steps]
    assert shares == [0.5, 0, 0.25, 0]
    assert [caption for _, caption in steps[0][1]] == ["1", "2", "3"]
    assert [caption for _, caption in steps[-1][1]][:3] == ["1.1", "1.2", "2.1"]


def test_session_rejects_invalid_uploads(session, examples, tmp_path):
    images, answers, (query,) = examples["depth"]
    for xs, ys, one, words in [
        (images, answers[:1], query, "2 example images and 1 answers"),
        (None, None, query, "0 example images and 0 answers"),
        (images, answers, None, "no query"),
        (images * 17, answers * 17, query, "34 example images; at most 32"),
    ]:
        with pytest.raises(UserError, match=words):
            session.pairs(xs, ys, one)
    frames = [Image.new("L", (SIDE, SIDE), shade) for shade in (0, 255)]
    moving = tmp_path / "moving.gif"
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    for xs, one in [([str(moving), images[0]], query), (images, str(moving))]:
        with pytest.raises(UserError, match=r"moving\.gif holds 2 images"):
            session.pairs(xs, answers, one)
    with pytest.raises(UserError, match="no frames"):
        session.sequence(None)
    with pytest.raises(UserError, match="holds 6 images"):
        next(session.answer(session.sequence(images * 3), 1, 1, SamplingParams(), 0))


def test_playground_without_gradio_names_the_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert playground.main(["--model=m", "--tokenizer=t"]) == errors.EXIT_BAD_INPUT
    assert "pip install '.[playground]'" in capsys.readouterr().err
