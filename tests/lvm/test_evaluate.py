"""LPIPS and derived streams of `lvm evaluate`."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from lvm import evaluate
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.derived import DerivedStreams
from lvm.data.images.sources.generated import GeneratedSource
from lvm.evaluation.config import LPIPSConfig
from tokenizer.perceptual import lpips


@pytest.fixture
def small_files(monkeypatch, tmp_path):
    """Random weights of a network with one small convolution a block."""
    monkeypatch.setattr(lpips, "_BLOCKS", (((0, 4),), ((5, 6),)))
    rng, paths = np.random.default_rng(0), []
    for name, shapes in (("weights", lpips._backbone_shapes()), ("heads", lpips._head_shapes())):
        paths.append(str(tmp_path / f"{name}.safetensors"))
        save_file({key: rng.random(shape, np.float32) - (name == "weights") / 2 for key, shape in shapes.items()},
                  paths[-1])  # fmt: skip
    return LPIPSConfig(*paths)


def test_lpips_is_of_each_pair_for_any_batch_size(small_files):
    images, truth = np.random.default_rng(1).integers(0, 256, (2, 4, 16, 16, 3), dtype=np.uint8)
    truth[3] = images[3]
    distances = evaluate._lpips(small_files, 16, 2)(images, truth)
    network = lpips.LPIPS(weights=small_files.weights, heads=small_files.heads)
    params = network.load()
    pairs = [[jnp.float32(x[None]) / 255 for x in pair] for pair in zip(images, truth, strict=True)]
    expected = [float(network.distance(params, *pair, "float32")) for pair in pairs]
    np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=1e-7)
    assert distances[3] < 1e-12
    assert min(distances[:3]) > 0.01
    np.testing.assert_allclose(evaluate._lpips(small_files, 16, 64)(images, truth), distances, rtol=1e-5, atol=1e-7)


def test_lpips_names_the_setting_of_a_missing_file(small_files):
    with pytest.raises(UserError, match=r"^config\.lpips\.heads is empty"):
        evaluate._lpips(LPIPSConfig(small_files.weights), 16, 2)
    with pytest.raises(UserError, match=r"^config\.lpips\.weights=nowhere\.pth: no such file"):
        evaluate._lpips(LPIPSConfig("nowhere.pth"), 16, 2)


def test_lpips_needs_images_of_sixteen_pixels(small_files):
    with pytest.raises(UserError, match=r"^config\.lpips: the tokenizer's images are 8 pixels wide"):
        evaluate._lpips(small_files, 8, 2)


def test_derived_streams_have_the_seed_of_the_source():
    """The second call adds what the first left out, with the same noise as both at once."""
    scenes = GeneratedSource(Preprocess(16), num_scenes=2, num_frames=1, streams=("rgb",))
    whole = DerivedStreams(scenes, ("gray", "noisy"), seed=3)
    source = evaluate.with_derived(DerivedStreams(scenes, ("gray",), seed=3), ("gray", "noisy"))
    assert list(source.streams) == ["rgb", "gray", "noisy"]
    np.testing.assert_array_equal(source.load(1).images, whole.load(1).images)
    assert evaluate.with_derived(source, ("gray",)) is source
