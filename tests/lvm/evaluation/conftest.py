"""A context of held-out scenes and a model that answers as it is told."""

import types

import numpy as np
import pytest

from lvm.data.mixture.mixture import MixtureConfig
from lvm.evaluation.evaluator import Context, Tokenizer
from lvm.evaluation.heldout import Heldout
from lvm.inference.pretrained import LVM
from lvm.model.vocabulary import Vocabulary


class AnsweringModel(LVM):
    """Answers each prompt, int [K, N], by a function of it; counts the prompts."""

    def __init__(self, answer):
        self._answer, self.vocabulary = answer, Vocabulary.for_codes(256)
        self.record = {"stores": [], "sources": []}
        self.num_prompts, self.batch_sizes = 0, []

    def generate(self, grids, num_images, candidates=1, temperature=1.0, top_k=0, top_p=1.0, seed=0):
        assert len(seed) == len(grids)
        self.num_prompts += len(grids)
        self.batch_sizes.append(len(grids))
        return np.stack([np.repeat(self._answer(grid)[None], num_images, axis=0) for grid in grids])

    def max_images(self, codes_per_image):
        return 16


class GivenHeldout(Heldout):
    def __init__(self, scenes, codecs):
        self.scenes, self.codecs, self.failures = scenes, codecs, []


@pytest.fixture(scope="session")
def make_context(exact_codec):
    """(scenes, codecs, answer) → a context; `answer` is the last grid of the prompt unless it is given."""

    def make(scenes, codecs, answer=lambda grid: grid[-1], mixture=None, **options):
        encode, decode = exact_codec
        tokenizer = Tokenizer(encode, decode, {"hash": "a" * 64}, 256, 48)
        source = types.SimpleNamespace(name="given")
        context = Context(AnsweringModel(answer), tokenizer, mixture or MixtureConfig(), source, **options)
        context.heldout = GivenHeldout(scenes, codecs)
        return context

    return make


@pytest.fixture
def knows():
    """(scenes, target) → an answer that is the truth of the prompt's query."""

    def make(scenes, target):
        frames = [(scene, frame) for scene in scenes for frame in range(len(scene.images))]
        truths = {scene.grid(frame, "rgb").tobytes(): scene.grid(frame, target) for scene, frame in frames}
        return lambda grid: truths[np.asarray(grid[-1]).tobytes()]

    return make
