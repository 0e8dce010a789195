"""Perceptual losses: published sizes, and weight files that are missing or of another network."""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from lvm.common.errors import UserError
from tokenizer.perceptual.base import MultiScaleSSIM, NoPerceptual, Perceptual
from tokenizer.perceptual.convnext import ConvNeXtSmall
from tokenizer.perceptual.lpips import LPIPS
from tokenizer.perceptual.resnet import ResNet50

WITH_WEIGHTS = {"lpips": LPIPS, "resnet50": ResNet50, "convnext_small": ConvNeXtSmall}
# Parameters of torchvision's models; of VGG16 the convolutions, with 1472 weights of heads.
SIZES = {"lpips": 14_714_688 + 1472, "resnet50": 25_557_032, "convnext_small": 50_223_688}


def test_every_kind_is_tested_here():
    assert Perceptual.kinds == WITH_WEIGHTS | {"none": NoPerceptual, "ms_ssim": MultiScaleSSIM}


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_networks_have_published_parameter_counts(kind):
    shapes = WITH_WEIGHTS[kind]().tensor_shapes()
    counted = {name: shape for name, shape in shapes.items() if ".running_" not in name}
    assert sum(int(np.prod(shape)) for shape in counted.values()) == SIZES[kind]


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_missing_weights_say_where_to_get_them(kind, tmp_path):
    with pytest.raises(UserError, match=r"^config\.loss\.perceptual\.weights is empty; .*https://download\.pytorch"):
        WITH_WEIGHTS[kind]().load()
    with pytest.raises(UserError, match=r"^config\.loss\.perceptual\.weights=.*x\.pth: no such file; https://"):
        WITH_WEIGHTS[kind](weights=str(tmp_path / "x.pth")).load()


def test_lpips_needs_heads_besides(tmp_path):
    shapes = {name: shape for name, shape in LPIPS().tensor_shapes().items() if name.startswith("features")}
    path = str(tmp_path / "vgg.safetensors")
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path)
    with pytest.raises(UserError, match=r"^config\.loss\.perceptual\.heads is empty; .*lpips/weights/v0\.1/vgg\.pth"):
        LPIPS(weights=path).load()


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_weights_of_another_network_are_named(kind, tmp_path):
    path = str(tmp_path / "x.safetensors")
    save_file({"conv1.weight": np.zeros((3, 3), np.float32), "fc.bias": np.zeros(1000, np.float32)}, path)
    message = rf"^{re.escape(path)}: not the tensors of this network: \d+ missing \("
    with pytest.raises(UserError, match=message):
        WITH_WEIGHTS[kind](weights=path).load()
