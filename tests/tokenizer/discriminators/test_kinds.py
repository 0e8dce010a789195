"""Discriminators: forms, statistics and the blur."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import convolve2d

from lvm.common.errors import UserError
from lvm.model import nnx_utils
from tokenizer.discriminators.base import Discriminator
from tokenizer.discriminators.blur_pool import BlurPool, blur_pool
from tokenizer.discriminators.patchgan import PatchGAN

KINDS = {"patchgan": PatchGAN(channels=8, layers=2), "blur_pool": BlurPool(channels=8, stages=2, norm_groups=4)}


def test_every_kind_is_tested_here():
    assert Discriminator.kinds == {kind: type(config) for kind, config in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_smallest_image_leaves_a_logit(kind):
    config, side = KINDS[kind], KINDS[kind].min_resolution
    graphdef, params = nnx_utils.abstract_module(lambda rngs: config.build("bfloat16", rngs))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}

    def judge(params, images):
        return nnx_utils.merge(graphdef, params)(images)

    for size, smallest in ((side, True), (4 * side, False)):
        logits, features = jax.eval_shape(judge, params, jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32))
        assert logits.dtype == jnp.float32
        assert logits.shape[0] == 2
        assert (logits.shape[1:] == (1, 1)) == smallest
        assert len(features) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_of_batch_or_of_image(kind):
    network = KINDS[kind].build("float32", nnx_utils.nnx.Rngs(params=jax.random.key(0)))
    graphdef, params = nnx_utils.split(network)
    images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3))
    judge = jax.jit(lambda params, images: nnx_utils.merge(graphdef, params)(images)[0])
    together, alone = judge(params, images)[:1], judge(params, images[:1])
    assert (np.abs(together - alone).max() < 1e-4) == (KINDS[kind].min_batch == 1)


def test_blur_pool_equals_filter_and_subsampling():
    image = np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32)
    kernel = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    expected = convolve2d(np.pad(image, 1), kernel, "valid")[::2, ::2]
    np.testing.assert_allclose(jax.jit(blur_pool)(image[None, :, :, None])[0, :, :, 0], expected, rtol=1e-5, atol=1e-6)


def test_blur_pool_groups_must_divide():
    with pytest.raises(UserError, match="norm_groups=3 must divide channels=8"):
        BlurPool(channels=8, norm_groups=3)
