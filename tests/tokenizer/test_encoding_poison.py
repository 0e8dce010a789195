"""Scenes that end, hang or bloat their decoder: listed, and no other scene is lost or changed."""

import numpy as np
import psutil
import pytest

from lvm.data.images.augment import Augment
from lvm.data.images.decode_worker import Limits
from lvm.data.store import failures
from lvm.data.store.reader import Store
from tests.tokenizer.networks import random_weights, small
from tests.tokenizer.poison_scenes import SCENES, SIDE, PoisonScenes
from tokenizer import Tokenizer
from tokenizer.encode import finish
from tokenizer.encoding import Encoder


@pytest.fixture(scope="module")
def tokenizer():
    weights = random_weights(small("maskgit", resolution=SIDE, channel_multipliers=(1, 2), codebook_size=64))
    return Tokenizer(weights.config, weights.preprocess, weights.params)


def encode(tokenizer, folder, faults, workers, **limits):
    source = PoisonScenes(faults)
    Encoder(tokenizer, source, folder, 2, 2, Augment(0, tokenizer.preprocess), workers, Limits(**limits)).run()
    finish(str(folder))
    return Store(folder)


def contents(store):
    return {store.scene(i).key: store.scene(i).codes for i in range(len(store))}


def test_encoder_lists_poison_and_stores_all_others(tokenizer, tmp_path):
    healthy = contents(encode(tokenizer, tmp_path / "healthy", {}, workers=0))
    faults = {9: "exit", 20: "hang in C", 30: "memory"}
    store = encode(tokenizer, tmp_path / "store", faults, 2, decode_timeout_s=2, decode_memory_gb=0.25)
    assert list(failures.read(store.path)) == [
        {"key": "scene 9", "reason": "its decoder ended with exit code 3"},
        {"key": "scene 20", "reason": "decoding took over 2 s"},
        {"key": "scene 30", "reason": "decoding took over 0.25 GB"},
    ]
    stored = contents(store)
    assert list(stored) == [f"scene {i}" for i in range(SCENES) if i not in faults]
    for key, codes in stored.items():
        np.testing.assert_array_equal(codes, healthy[key])


def test_interrupted_encoder_leaves_no_worker(tokenizer, tmp_path, monkeypatch):
    before = psutil.Process().children()  # other tests' fork servers

    def interrupt(images):
        assert len(psutil.Process().children()) > len(before)
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "encode_async", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode(tokenizer, tmp_path / "store", {30: "hang in C"}, workers=2)
    assert [child for child in psutil.Process().children() if child not in before] == []
