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
