"""What every kind of quantizer does, alone and in the network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvm.common import files
from lvm.common.config import from_config_dict, to_config_dict, to_json
from lvm.common.errors import UserError
from lvm.model import nnx_utils
from lvm.training.workdir import CONFIG
from tests.tokenizer.networks import check_same, random_weights
from tests.tokenizer.quantizers.arrays import normal
from tokenizer import Tokenizer, weights
from tokenizer.network import VARIANTS, VQGAN, VQGANConfig
from tokenizer.quantizers.base import Quantizer
from tokenizer.quantizers.fsq import FSQ
from tokenizer.quantizers.ibq import IBQ
from tokenizer.quantizers.simvq import SimVQ
from tokenizer.quantizers.vq import L2VQ, VQ

KINDS = {
    "vq": VQ(entropy=0.1), "l2_vq": L2VQ(gradient="rotation"), "simvq": SimVQ(), "ibq": IBQ(), "fsq": FSQ((4, 4, 3))
}  # fmt: skip
K, C = 48, 3
NETWORK = VQGANConfig(
    resolution=16, patch_size=4, channels=8, channel_multipliers=(1,), encoder_blocks=1, decoder_blocks=1,
    middle_blocks=0, codebook_size=K, codebook_dim=C, norm_groups=4,
)  # fmt: skip


def test_every_kind_is_tested_here():
    assert Quantizer.kinds == {kind: type(quantizer) for kind, quantizer in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_agrees_with_lookup(kind):
    quantizer = KINDS[kind]
    params = quantizer.init(K, C, jax.random.key(0))
    latents = quantizer.prepare(normal(2, 5, C))
    quantized = jax.jit(quantizer.quantize)(params, latents)
    assert (quantized.codes.shape, quantized.codes.dtype) == ((2, 5), jnp.int32)
    vectors = quantizer.lookup(params, quantized.codes)
    np.testing.assert_allclose(quantized.vectors, vectors, rtol=1e-5, atol=1e-5)
    if kind != "ibq":  # whose code is not the nearest row
        np.testing.assert_array_equal(quantizer.quantize(params, vectors).codes, quantized.codes)
    for name, term in {**quantized.losses, **quantized.statistics}.items():
        assert (term.shape, term.dtype) == ((), jnp.float32), name
    assert all(getattr(quantizer, name) > 0 for name in quantized.losses)
    assert set(quantizer.trained) <= set(params)


@pytest.mark.parametrize("kind", KINDS)
def test_update_keeps_the_form_of_params_and_state(kind):
    quantizer = KINDS[kind]
    params = quantizer.init(K, C, jax.random.key(0))
    state, latents = quantizer.init_state(params), quantizer.prepare(normal(64, C))
    seeded = quantizer.seed(params, latents, jax.random.key(1))
    codes = quantizer.quantize(seeded, latents).codes
    updated, new_state = jax.jit(quantizer.update)(seeded, state, latents, codes, jax.random.key(2))
    for before, after in ((params, updated), (params, seeded), (state, new_state)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)


@pytest.mark.parametrize("kind", KINDS)
def test_network_gets_gradients_through_each_kind(kind):
    config = dataclasses.replace(NETWORK, quantizer=KINDS[kind])
    graphdef, _ = nnx_utils.abstract_module(lambda rngs: VQGAN(config, rngs))
    params = random_weights(config).params
    images = jnp.asarray(np.random.default_rng(1).random((2, 16, 16, 3), np.float32))

    def loss(params):
        model = nnx_utils.merge(graphdef, params)
        latents = model.encode_latents(images)
        vectors = config.quantizer.quantize({n: params[n] for n in params if n in ("codebook", "projection")}, latents)
        return jnp.square(model.decode_latents(vectors.vectors) - images).mean()

    gradients = jax.jit(jax.grad(loss))(params)
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradients["encoder"])) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_stored_tokenizer_reads_back(kind, tmp_path):
    config = dataclasses.replace(NETWORK, quantizer=KINDS[kind])
    stored = random_weights(config)
    tokenizer = Tokenizer(config, stored.preprocess, stored.params)
    weights.write(tmp_path / "tokenizer", stored, "orbax")
    loaded = Tokenizer.load(tmp_path / "tokenizer")
    assert loaded.config == config
    assert loaded.identity() == tokenizer.identity()
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    codes = loaded.encode(images)
    np.testing.assert_array_equal(codes, tokenizer.encode(images))
    np.testing.assert_array_equal(loaded.decode(codes), tokenizer.decode(codes))


@pytest.mark.parametrize("kind", ["vq", "l2_vq"])
def test_record_of_earlier_release_is_read(kind, tmp_path):
    config = dataclasses.replace(NETWORK, quantizer=Quantizer.kinds[kind]())
    stored = random_weights(config)
    weights.write(tmp_path / "tokenizer", stored, "orbax")
    record = files.read_json(tmp_path / "tokenizer" / CONFIG)
    del record["config"]["model"]["quantizer"]
    record["config"]["model"]["l2_normalize"] = kind == "l2_vq"
    files.write_json(tmp_path / "tokenizer" / CONFIG, record)
    check_same(weights.read(tmp_path / "tokenizer"), stored)


@pytest.mark.parametrize("kind", KINDS)
def test_config_file_selects_each_kind(kind):
    config = dataclasses.replace(NETWORK, quantizer=KINDS[kind])
    values = to_config_dict(config)
    assert values.quantizer.kind == kind
    assert from_config_dict(VQGANConfig, values) == config
    with pytest.raises(UserError, match=r"config\.quantizer\.kind: 'lfq' is not one of fsq, ibq, "):
        from_config_dict(VQGANConfig, to_json(config) | {"quantizer": {"kind": "lfq"}})


def test_description_ignores_training():
    assert VQ(ema_decay=0.5).describe() == VQ().describe() == {"kind": "vq"}
    assert FSQ().describe() == {"kind": "fsq", "levels": (8, 5, 5, 5)}
    assert len({str(dataclasses.replace(NETWORK, quantizer=q).describe()) for q in KINDS.values()}) == len(KINDS)


def test_plain_codebook_keeps_its_description_in_stores():
    keys = (
        "resolution patch_size channels channel_multipliers encoder_blocks decoder_blocks middle_blocks codebook_size "
        "codebook_dim norm_groups block_bias shortcut downsample upsample latent_kernel quant_convs l2_normalize"
    )
    for network in VARIANTS.values():
        assert sorted(network.describe()) == sorted(keys.split())
        assert network.describe()["l2_normalize"] is False
    assert dataclasses.replace(NETWORK, quantizer=L2VQ()).describe()["l2_normalize"] is True
