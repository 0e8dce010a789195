"""Parity of the three networks with torch: diffusers for the released one, `scripts.peer_torch_vqgan` for the others.

Random weights at reduced width, and the released network at full width; compares arithmetic, layouts and files.
"""

import dataclasses
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

from lvm.model import nnx_utils
from tests.commands import ROOT
from tests.tokenizer.networks import check_same, random_weights, same_bits, small
from tokenizer import weights
from tokenizer.network import VARIANTS, VQGAN

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
peers = pytest.importorskip("scripts.peer_torch_vqgan")

_FILES = {"torch": "model.safetensors", "diffusers": "diffusion_pytorch_model.safetensors"}


def run_jax(stored, images):
    graphdef, _ = nnx_utils.abstract_module(lambda rngs: VQGAN(stored.config, rngs))

    @jax.jit
    def run(params, images):
        model = nnx_utils.merge(graphdef, params)
        latents = model.encode_latents(images)
        codes = model.quantize(latents)
        return latents, codes, model.decode_float(codes)

    return [np.asarray(x) for x in run(stored.params, images)]


def spread_codebook(stored, images):
    """Gives the codebook the latents' mean and scale per channel, so that many codes are in use."""
    latents, _, _ = run_jax(stored, images)
    rng = np.random.default_rng(1)
    shape = stored.params["codebook"].shape
    rows = latents.mean((0, 1, 2)) + latents.std((0, 1, 2)) * rng.standard_normal(shape)
    return dataclasses.replace(stored, params=stored.params | {"codebook": rows.astype(np.float32)})


def check_agreement(stored, theirs, images, different=5):
    """Asserts equal latents, codes (except near ties) and images of our network and torch's."""
    ours, codes, decoded = run_jax(stored, images)
    with torch.no_grad():
        latents = theirs.latents(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        their_codes = theirs.codes(latents).numpy()
        reference = theirs.decode(torch.from_numpy(codes.copy()).long()).numpy().transpose(0, 2, 3, 1)
    latents = latents.numpy().transpose(0, 2, 3, 1)  # [B, h, w, C]
    np.testing.assert_allclose(ours, latents, atol=1e-4, rtol=0)

    rows = np.asarray(stored.params["codebook"], np.float64)
    flat = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    distances = np.square(flat).sum(-1)[:, None] - 2 * flat @ rows.T + np.square(rows).sum(-1)  # [B·N, K]
    nearest_two = np.partition(distances, 1, axis=-1)[:, :2]
    clear = (nearest_two[:, 1] - nearest_two[:, 0] > 1e-3).reshape(codes.shape)
    assert clear.mean() > 0.9
    assert len(np.unique(codes)) > different
    np.testing.assert_array_equal(codes[clear], distances.argmin(-1).reshape(codes.shape)[clear])
    np.testing.assert_array_equal(codes[clear], their_codes[clear])

    np.testing.assert_allclose(decoded, reference, atol=1e-4, rtol=0)
    assert decoded.std() > 0.05


def pixels(count=3, side=64):
    return np.random.default_rng(2).random((count, side, side, 3), np.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_weights_load_in_torch(variant, tmp_path):
    """Torch loads what `write` writes, strictly, and computes the same."""
    stored = spread_codebook(random_weights(small(variant)), pixels())
    kind = "diffusers" if variant == "lvm" else "torch"
    weights.write(tmp_path / "out", stored, kind)
    theirs = peers.NETWORKS[variant](stored.config).eval()
    state = safetensors.load_file(tmp_path / "out" / _FILES[kind])
    (theirs.model if variant == "lvm" else theirs).load_state_dict(state, strict=True)
    check_agreement(stored, theirs, pixels())


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_weights_load_here(variant, tmp_path):
    """Weights written by torch, as safetensors or as a pickle, are read exactly and compute the same."""
    config = small(variant)
    torch.manual_seed(0)
    theirs = peers.NETWORKS[variant](config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    folder = tmp_path / "in"
    if variant == "lvm":
        theirs.model.save_pretrained(folder)
        stored = weights.read(folder)
    else:
        folder.mkdir()
        torch.save(theirs.state_dict(), folder / "xh_ckpt.pth")
        fields = {"variant": variant, "resolution": 64, "channels": 32}
        weights.files.write_json(folder / "config.json", fields | {"codebook_size": 128, "codebook_dim": 8})
        stored = weights.read(folder)
    assert stored.config == config
    stored = spread_codebook(stored, pixels())
    name = {"maskgit": "quantize", "lvm_old": "quantizer", "lvm": "model.quantize"}[variant]
    codebook = theirs.get_parameter(f"{name}.embedding.weight")
    codebook.data = torch.from_numpy(np.array(stored.params["codebook"]))
    check_agreement(stored, theirs, pixels())


def test_diffusers_round_trips_our_folder(tmp_path):
    stored = spread_codebook(random_weights(small("lvm")), pixels())
    weights.write(tmp_path / "ours", stored, "diffusers")
    theirs = diffusers.VQModel.from_pretrained(tmp_path / "ours")
    check_agreement(stored, peers.ReleasedLVM(theirs.eval()), pixels())
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=False)  # a pickle of torch
    assert not list((tmp_path / "theirs").glob("*.safetensors"))
    again = weights.read(tmp_path / "theirs")
    assert again.config == stored.config
    same_bits(again.params, stored.params)


@pytest.mark.parametrize("variant", ["lvm", "maskgit"])
def test_documented_line_writes_a_torch_file(variant, tmp_path):
    """docs/interop.md has a line for loaders that read `pytorch_model.bin` alone, as open-muse's does."""
    stored = random_weights(small(variant), mode="center_crop")
    weights.write(tmp_path / "DST", stored, "torch")
    (line,) = re.findall(
        r"^python -c .*pytorch_model\.bin.*$", (ROOT / "docs" / "interop.md").read_text(), re.MULTILINE
    )
    subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=tmp_path, check=True)
    state = torch.load(tmp_path / "DST" / "pytorch_model.bin", weights_only=True)
    assert {name: tuple(x.shape) for name, x in state.items()} == {
        name: x.shape for name, x in weights.to_layout(stored, weights.layouts.find_layout(variant, "torch")).items()
    }
    for source in (tmp_path / "DST", tmp_path / "DST" / "pytorch_model.bin"):
        check_same(weights.read(source), stored)


def test_released_network_at_full_width():
    config = dataclasses.replace(VARIANTS["lvm"], resolution=32)  # fewer pixels, all parameters
    images = pixels(3, side=32)
    stored = spread_codebook(random_weights(config), images)
    state = {
        name: torch.from_numpy(array)
        for name, array in weights.to_layout(stored, weights.layouts.find_layout("lvm", "diffusers")).items()
    }
    theirs = peers.released(config)
    theirs.model.load_state_dict(state, strict=True)
    check_agreement(stored, theirs, images)
