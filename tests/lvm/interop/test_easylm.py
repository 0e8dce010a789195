"""EasyLM's streaming checkpoints: conventions of EasyLM, and errors for files that are damaged."""

import pickle

import flax.serialization
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.inference.pretrained import LVM
from lvm.interop import models, tensors
from lvm.interop.easylm import read_stream, write_stream
from tests.lvm.small_models import PUBLISHED, SMALL, assert_same_tensors, small_model

pytest.importorskip("safetensors")


def interleaved_logits(named, config, tokens):
    """LLaMA as EasyLM computes it, in float64: RoPE rotates neighbors of a head as one complex number."""
    D, H, K = config.hidden_size, config.num_heads, config.kv_heads
    d, T = D // H, len(tokens)
    arrays = {name: tensor.read().astype(np.float64) for name, tensor in named.items()}
    angles = np.outer(np.arange(T), config.rope_theta ** (-np.arange(0, d, 2) / d))
    rotations = np.exp(1j * angles)[:, None]  # [T, 1, d/2]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    def rotate(x):
        pairs = x.reshape(T, -1, d // 2, 2)
        product = (pairs[..., 0] + 1j * pairs[..., 1]) * rotations
        return np.stack([product.real, product.imag], -1).reshape(T, -1, d)

    x = arrays["transformer.wte.embedding"][tokens]  # [T, D]
    for i in range(config.num_layers):
        layer = {n.removeprefix(f"transformer.h.{i}."): a for n, a in arrays.items() if f".h.{i}." in n}
        h = norm(x, layer["attention_norm.kernel"])
        query = rotate(h @ layer["attention.wq.kernel"])  # [T, H, d]
        key = np.repeat(rotate(h @ layer["attention.wk.kernel"]), H // K, 1)
        value = np.repeat((h @ layer["attention.wv.kernel"]).reshape(T, K, d), H // K, 1)
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(d)
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, value).reshape(T, D) @ layer["attention.wo.kernel"]
        h = norm(x, layer["ffn_norm.kernel"])
        gate = h @ layer["feed_forward.w1.kernel"]
        gated = gate / (1 + np.exp(-gate)) * (h @ layer["feed_forward.w3.kernel"])
        x = x + gated @ layer["feed_forward.w2.kernel"]
    return norm(x, arrays["transformer.ln_f.kernel"]) @ arrays["lm_head.kernel"]


def test_easylm_logits_match_interleaved_rope(tmp_path):
    checkpoint = small_model(num_heads=4, num_kv_heads=2, context=1100, hidden_size=32)
    models.write(tmp_path / "x", checkpoint, "easylm")
    named = {".".join(key): value for key, value in read_stream(tmp_path / "x" / "streaming_params").items()}
    tokens = np.random.default_rng(0).integers(0, SMALL.size, 1100)
    expected = interleaved_logits(named, checkpoint.config, tokens)
    assert expected.std() > 0.5
    np.testing.assert_allclose(LVM.load(tmp_path / "x").logits(tokens[None])[0], expected, rtol=0, atol=1e-4)


def easylm_folder(folder, checkpoint, prefix=(), name="streaming_params", others=()):
    """A folder as EasyLM writes it: `prefix` before every key, other objects of a train state before them."""
    models.write(folder, checkpoint, "easylm")
    stream = folder / "streaming_params"
    entries = [((*prefix, *key), value) for key, value in read_stream(stream).items()]
    entries = [(key, flax.serialization.to_bytes(value.read())) for key, value in entries]
    stream.unlink()
    with open(folder / name, "wb") as file:
        for key, value in [*others, *entries]:
            file.write(msgpack.packb((key, value)))
    (folder / "lvm.json").unlink()
    (folder / "vocabulary.json").unlink()
    return folder


@pytest.mark.parametrize("prefix", [(), ("params",), ("params", "params")])
def test_read_easylm_key_prefixes(prefix, tmp_path):
    checkpoint = small_model(PUBLISHED, step=0)
    zeros = flax.serialization.to_bytes(np.zeros(3, np.float32))
    others = []
    if len(prefix) == 2:
        others = [
            (("step",), flax.serialization.to_bytes(np.int32(5))),
            (("opt_state", "mu", "params", "lm_head", "kernel"), zeros),
        ]
    folder = easylm_folder(tmp_path / "x", checkpoint, prefix, "streaming_train_state_500", others)
    loaded = models.read(folder)
    assert_same_tensors(loaded, checkpoint)
    assert loaded.vocabulary == PUBLISHED
    assert_same_tensors(models.read(folder / "streaming_train_state_500"), checkpoint)  # the file itself
    (folder / "streaming_params").write_bytes(b"")
    with pytest.raises(UserError, match="weights: streaming_params, streaming_train_state_500"):
        models.read(folder)


def test_easylm_orbax_easylm_is_byte_identical(tmp_path):
    models.write(tmp_path / "a", small_model(), "easylm")
    models.write(tmp_path / "b", models.read(tmp_path / "a"), "orbax")
    models.write(tmp_path / "c", models.read(tmp_path / "b"), "easylm")
    first, last = (tmp_path / name / "streaming_params" for name in "ac")
    assert first.read_bytes() == last.read_bytes()


def test_read_stream_joins_chunked_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
    array = np.arange(60, dtype=np.float32).reshape(5, 12)
    write_stream(tmp_path / "x", [(("a", "b"), tensors.from_array(array))])
    (loaded,) = read_stream(tmp_path / "x").values()
    assert (loaded.shape, loaded.dtype) == ((5, 12), np.float32)
    np.testing.assert_array_equal(loaded.read(), array)


@given(cut=st.integers(1, 10**6))
@settings(max_examples=25)
def test_read_easylm_rejects_truncated_stream(cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    models.write(folder / "x", small_model(), "easylm")
    path = folder / "x" / "streaming_params"
    content = path.read_bytes()
    path.write_bytes(content[: cut % (len(content) - 1) + 1])
    with pytest.raises(UserError, match=r"streaming_params: not (a complete|the tensors)") as e:
        models.read(folder / "x")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"", b"\x00" * 99, b"not msgpack at all", pickle.dumps({"a": 1})])
def test_read_easylm_rejects_other_files(content, tmp_path):
    models.write(tmp_path / "x", small_model(), "easylm")
    (tmp_path / "x" / "streaming_params").write_bytes(content)
    with pytest.raises(UserError, match=r"streaming_params: (not a complete|empty)"):
        models.read(tmp_path / "x")
