"""Features of FID: sizes, resizing, and weights of another network."""

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from lvm.common.errors import UserError
from tokenizer.evaluation import inception


def test_network_has_published_parameter_count():
    shapes = inception.tensor_shapes()
    counted = [shape for name, shape in shapes.items() if ".running_" not in name]
    # torchvision's inception_v3 without auxiliary classifier (27,161,264 with both) and final layer of 1000 classes.
    assert sum(int(np.prod(shape)) for shape in counted) == 27_161_264 - 3_326_696 - 2_049_000


@pytest.mark.parametrize("side", [64, 400])
def test_resize_is_that_of_clean_fid(side):
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    channels = [Image.fromarray(image[..., i].astype(np.float32)) for i in range(3)]
    resized = [np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC)) for channel in channels]
    expected = np.stack(resized, -1).clip(0, 255)
    np.testing.assert_allclose(jax.jit(inception.resize)(image[None])[0], expected, atol=1e-2)


def test_weights_of_another_network_are_named(tmp_path):
    with pytest.raises(UserError, match=r"^--inception_weights is empty; FID needs weights, .*pt_inception-2015-12-05"):
        inception.load("", "--inception_weights")
    save_file({"Conv2d_1a_3x3.conv.weight": np.zeros((32, 3, 3, 3), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors: not the tensors of this network: \d+ missing \("):
        inception.load(str(tmp_path / "x.safetensors"), "--inception_weights")
