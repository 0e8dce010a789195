"""A loaded tokenizer: codes are independent of batch, padding and device."""

import functools

import jax
import numpy as np
import pytest

from lvm.common.errors import UserError
from tests.tokenizer.networks import random_weights, small
from tokenizer import Tokenizer

SIDE = 32


@functools.cache  # its programs are compiled once
def tokenizer_of(variant):
    config = small(variant, resolution=SIDE, channel_multipliers=(1, 1, 2), codebook_size=512)
    stored = random_weights(config)
    plain = Tokenizer(config, stored.preprocess, stored.params)
    latents = plain.encode_latents(pictures(8))  # [8, N, C]
    rng = np.random.default_rng(1)
    shape = stored.params["codebook"].shape
    # Mean and scale of the latents, so that many codes are in use, with near ties among them.
    rows = latents.mean((0, 1)) + latents.std((0, 1)) * rng.standard_normal(shape)
    return Tokenizer(config, stored.preprocess, stored.params | {"codebook": rows.astype(np.float32)})


def pictures(count):
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def test_repr_has_sizes():
    stored = random_weights(small("lvm", resolution=32, channel_multipliers=(1, 2), codebook_size=512))
    tokenizer = Tokenizer(stored.config, stored.preprocess, stored.params, step=7)
    assert repr(tokenizer) == ("<Tokenizer: 816,763 parameters, images of 32×32, 16×16 codes of 512, float32, step 7>")


@pytest.mark.parametrize("variant", ["lvm", *(pytest.param(v, marks=pytest.mark.slow) for v in ("maskgit", "lvm_old"))])
def test_codes_are_independent_of_batch_and_device(variant):
    """Alone, in batches of 7 and 64, with padding, on one device or eight: the same codes, in float32."""
    assert len(jax.local_devices()) == 8
    tokenizer, images = tokenizer_of(variant), pictures(64)
    together = tokenizer.encode(images)  # 64 images: eight devices of eight
    assert len(np.unique(together)) > 100
    alone = np.concatenate([tokenizer.encode(images[i : i + 1]) for i in range(0, 64, 9)])  # one device, padded
    np.testing.assert_array_equal(alone, together[::9])
    np.testing.assert_array_equal(tokenizer.encode(images[:7]), together[:7])
    np.testing.assert_array_equal(tokenizer.encode(images[5:22]), together[5:22])  # padded on eight devices
    np.testing.assert_array_equal(tokenizer.encode_async(images), together)
    on_one = np.concatenate([np.asarray(tokenizer.encoder(images[i : i + 8], 1)) for i in range(0, 64, 8)])
    np.testing.assert_array_equal(on_one, together)
    # Each device runs the same program in every call, so that latents agree to the bit too.
    latents = tokenizer.encode_latents(images)
    np.testing.assert_array_equal(tokenizer.encode_latents(images[:3]), latents[:3])


@pytest.mark.parametrize("batch_size", [7, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 64))])
def test_codes_are_independent_of_batch_size(batch_size):
    tokenizer, images = tokenizer_of("lvm"), pictures(64)
    np.testing.assert_array_equal(tokenizer.encode(images, batch_size), tokenizer.encode(images))


def test_decode_is_independent_of_devices():
    tokenizer = tokenizer_of("maskgit")
    codes = np.random.default_rng(0).integers(0, 512, (20, tokenizer.codes_per_image))
    together = tokenizer.decode_float(codes)
    assert together.shape == (20, SIDE, SIDE, 3)
    np.testing.assert_array_equal(tokenizer.decode_float(codes[:5]), together[:5])


def test_bfloat16_changes_few_codes():
    exact = tokenizer_of("lvm")
    config = exact.config.__class__(**{**exact.config.__dict__, "compute_dtype": "bfloat16"})
    rough = Tokenizer(config, exact.preprocess, exact.params)
    codes = exact.encode(pictures(16)), rough.encode(pictures(16))
    assert 0 < np.mean(codes[0] != codes[1]) < 0.2


def test_wrong_shapes_dtypes_and_codes_are_rejected():
    tokenizer = tokenizer_of("maskgit")
    with pytest.raises(UserError, match=r"\[1, 16, 16, 3\], expected \[B, 32, 32, 3\]"):
        tokenizer.encode(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="float64, expected uint8"):
        tokenizer.encode(np.zeros((1, 32, 32, 3)))
    with pytest.raises(UserError, match=r"from 0 to 512, the codebook has 0\.\.511"):
        tokenizer.decode(np.array([[0] * 63 + [512]]))
