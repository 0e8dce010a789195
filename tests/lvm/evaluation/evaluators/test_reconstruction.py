"""Reconstruction by exact and useless tokenizers."""

import dataclasses

import numpy as np
import pytest

from lvm.data.streams.codecs import Image, Palette
from lvm.evaluation.evaluators.reconstruction import Reconstruction

CODECS = {"rgb": Image(), "segmentation": Palette(("nothing", "thing"), background=0), "depth": None}


@pytest.fixture
def context(make_context, make_heldout_scenes):
    return make_context(make_heldout_scenes(4, palette=CODECS["segmentation"]), CODECS, batch_size=3)


def test_reconstruction_of_an_exact_tokenizer(context):
    figures, (picture,) = Reconstruction().run(context)
    values = {figure.name: figure.estimate.value for figure in figures}
    assert values["psnr/rgb"] == values["psnr/segmentation"] == pytest.approx(100)
    assert values["pixel_accuracy/segmentation"] == values["foreground_iou/segmentation"] == 1
    codes = np.concatenate([context.heldout.codes(stream).ravel() for stream in ("rgb", "segmentation")])
    assert values["codebook_usage"] == len(np.unique(codes)) / 256
    shares = np.unique(codes, return_counts=True)[1] / len(codes)
    assert values["codebook_perplexity"] == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))
    assert picture.title == "Reconstructions"
    assert picture.content.dtype == np.uint8


def test_reconstruction_of_a_constant_decoder(context):
    decode = context.tokenizer.decode
    white = dataclasses.replace(context.tokenizer, decode=lambda codes: np.full_like(decode(codes), 255))
    context.tokenizer = white
    values = {figure.name: figure.estimate.value for figure in Reconstruction().run(context)[0]}
    assert values["psnr/rgb"] < 10
    assert values["pixel_accuracy/segmentation"] < 0.8


def test_intervals_are_over_originals(make_context, make_heldout_scenes):
    """Frames of a video that are one picture tell as much as this."""
    codec = CODECS["segmentation"]
    scenes = make_heldout_scenes(12, frames=1, palette=codec)
    copied = [
        dataclasses.replace(
            x,
            info=dataclasses.replace(x.info, num_frames=8),
            images=np.repeat(x.images, 8, axis=0),
            codes=np.repeat(x.codes, 8, axis=0),
        )
        for x in scenes
    ]
    results = []
    for given in (scenes, copied):
        context = make_context(given, CODECS)
        decode = context.tokenizer.decode
        context.tokenizer = dataclasses.replace(context.tokenizer, decode=lambda x, f=decode: np.maximum(f(x), 128))
        results.append({figure.name: figure for figure in Reconstruction().run(context)[0]})
    once, often = results
    for name in ("psnr/rgb", "pixel_accuracy/segmentation", "foreground_iou/segmentation"):
        assert often[name].estimate.interval == pytest.approx(once[name].estimate.interval)
        assert np.ptp(often[name].estimate.interval) > 0
    assert "96 images of 12 originals" in often["psnr/rgb"].text
