"""Batches of a source: of one stream each, padded at the end, without what can't be read."""

import numpy as np
import pytest

from lvm.data.images.decode_worker import Limits
from lvm.data.images.preprocess import Preprocess
from tests.tokenizer.test_encoding import SCENES, SIDE, Scenes
from tokenizer.evaluation.image_batches import ImageBatches


def batches_of(source, max_images=0):
    batches = ImageBatches(source, Preprocess(SIDE), 4, 0, Limits(), max_images)
    return list(batches), batches


def test_batches_hold_every_image_once():
    source = Scenes()
    listed, batches = batches_of(source)
    assert batches.num_skipped == sum(bad for _, _, bad in SCENES)
    loaded = {}
    for batch in listed:
        assert batch.images.shape == (4, SIDE, SIDE, 3)
        assert not batch.images[len(batch.keys) :].any()
        loaded |= {(key, batch.stream): image for key, image in zip(batch.keys, batch.images, strict=False)}
    assert sum(len(batch.keys) for batch in listed) == len(loaded)
    for stream in ("rgb", "segmentation"):
        sizes = [len(batch.keys) for batch in listed if batch.stream == stream]
        assert sizes[:-1] == [4] * (len(sizes) - 1)
    count = 0
    for i in range(len(source)):
        scene = source.load(i)
        for frame, images in enumerate(scene.images):
            suffix = f"#{frame}" if len(scene.images) > 1 else ""
            for stream, image in zip(scene.info.streams, images, strict=True):
                np.testing.assert_array_equal(loaded[f"{scene.info.key}{suffix}", stream], image)
                count += 1
    assert count == len(loaded)


@pytest.mark.parametrize("limit", [1, 6])
def test_batches_end_at_the_limit(limit):
    listed, _ = batches_of(Scenes(), limit)
    assert sum(len(batch.keys) for batch in listed) == limit
