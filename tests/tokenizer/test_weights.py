"""Tokenizer folders: conversions between layouts are exact, and mismatches are named."""

import dataclasses
import json
import tempfile

import flax.serialization
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvm.common import files
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.store.manifest import same_codes
from tests.tokenizer.networks import check_same, random_weights, small
from tokenizer import Tokenizer, layouts, weights
from tokenizer.network import VARIANTS, VQGANConfig
from tokenizer.quantizers.vq import L2VQ

pytest.importorskip("safetensors")
TINY = {"resolution": 16, "channel_multipliers": (1, 2), "codebook_size": 16, "codebook_dim": 4}
OWN = VQGANConfig(
    resolution=16, patch_size=4, channels=8, channel_multipliers=(1,), encoder_blocks=1, decoder_blocks=1,
    middle_blocks=0, codebook_size=16, codebook_dim=4, norm_groups=4, quant_convs=False, quantizer=L2VQ(),
)  # fmt: skip


def kinds_of(variant):
    return ["orbax", *layouts.layout_kinds(variant)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_conversions_between_layouts_are_exact(variant, tmp_path):
    original = random_weights(small(variant, **TINY), mode="center_crop", filter="lanczos")
    folders = {}
    for kind in kinds_of(variant):
        folders[kind] = tmp_path / kind
        weights.write(folders[kind], original, kind)
        check_same(weights.read(folders[kind]), original)
    for source, target in zip(folders, [*list(folders)[1:], "orbax"], strict=True):
        folder = tmp_path / f"{source}-{target}"
        weights.write(folder, weights.read(folders[source]), target)
        check_same(weights.read(folder), original)


@st.composite
def networks(draw):
    """A network, and layouts that can express it."""
    variant = draw(st.sampled_from(sorted(VARIANTS)))
    stages, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    # Layouts of other projects have one number of blocks and no groups.
    kinds = [kind for kind in kinds_of(variant) if draw(st.booleans()) or kind == "orbax"]
    free = variant == "lvm_old" or (variant == "maskgit" and "torch" not in kinds)
    decoder_blocks, middle_blocks = (blocks, blocks) if variant == "maskgit" else (blocks + 1, 2)
    config = small(
        variant,
        resolution=2 ** (stages - 1) * draw(st.integers(1, 5)),
        channels=draw(st.sampled_from([8, 16, 24] if free else [32, 64])),
        channel_multipliers=(1, *draw(st.lists(st.integers(1, 3), min_size=stages - 1, max_size=stages - 1))),
        encoder_blocks=blocks,
        decoder_blocks=draw(st.integers(1, 3)) if free else decoder_blocks,
        middle_blocks=draw(st.integers(0, 3)) if free else middle_blocks,
        codebook_size=draw(st.integers(1, 40)),
        codebook_dim=draw(st.integers(1, 9)),
        norm_groups=draw(st.sampled_from([1, 4, 8])) if free else 32,
    )
    return config, kinds


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(network=networks(), seed=st.integers(0, 99), data=st.data())
def test_chains_of_conversions_are_exact_at_any_size(network, seed, data):
    config, kinds = network
    original = random_weights(config, seed)
    chain = data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))
    stored = original
    with tempfile.TemporaryDirectory() as folder:
        for i, kind in enumerate(chain):
            weights.write(f"{folder}/{i}", stored, kind)
            stored = weights.read(f"{folder}/{i}")
            check_same(stored, original)


def test_unpublished_network_has_only_orbax_layout(tmp_path):
    original = random_weights(OWN)
    weights.write(tmp_path / "ours", original, "orbax")
    check_same(weights.read(tmp_path / "ours"), original)
    with pytest.raises(UserError, match=r"\((\w+) has \w+: .+, not .+\) has no layout 'torch'; .* written as orbax"):
        weights.write(tmp_path / "torch", original, "torch")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"channels": 64, "norm_groups": 16}, "norm_groups: 16 would be read as 32"),
        ({"channels": 8, "norm_groups": 4}, r"read as\.norm_groups=32 must divide the channels .* \(8, 16\)"),
    ],
)
def test_write_names_what_a_layout_cannot_express(sizes, message, tmp_path):
    network = random_weights(small("maskgit", **TINY, **sizes))
    with pytest.raises(UserError, match=f"^the torch layout of maskgit cannot express this network: {message}$"):
        weights.write(tmp_path / "torch", network, "torch")
    assert not (tmp_path / "torch").exists()


@pytest.mark.parametrize(
    ("variant", "kind", "message"),
    [
        ("maskgit", "diffusers", "variant maskgit has no layout 'diffusers'; .* as orbax, torch, maskgit"),
        ("lvm_old", "maskgit", "variant lvm_old has no layout 'maskgit'; .* as orbax, torch"),
        ("lvm", "maskgit", "variant lvm has no layout 'maskgit'; .* as orbax, torch, diffusers"),
    ],
)
def test_write_rejects_layouts_of_other_variants(variant, kind, message, tmp_path):
    with pytest.raises(UserError, match=message):
        weights.write(tmp_path / "out", random_weights(small(variant, **TINY)), kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sizes", "kind", "message"),
    [
        ({"norm_groups": 8}, "torch", "norm_groups: 8 would be read as 32"),
        ({"middle_blocks": 1}, "diffusers", "middle_blocks: 1 would be read as 2"),
        ({"decoder_blocks": 2}, "torch", "decoder_blocks: 2 would be read as 3"),
        ({"channel_multipliers": (2, 2)}, "torch", "channel_mult: .2, 2., expected 1 as the first"),
    ],
)
def test_write_rejects_what_a_layout_cannot_express(sizes, kind, message, tmp_path):
    with pytest.raises(UserError, match=message):
        weights.write(tmp_path / "out", random_weights(small("lvm", **{**TINY, **sizes})), kind)


def test_write_is_atomic(tmp_path, monkeypatch):
    original = random_weights(small("maskgit", **TINY))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(UserError, match="full: exists "):
        weights.write(tmp_path / "full", original, "torch")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(weights.files, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        weights.write(tmp_path / "out", original, "torch")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# --- Reading published folders ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A small lvm tokenizer in the torch layout."""
    weights.write(tmp_path / "in", random_weights(small("lvm", **TINY)), "torch")
    return tmp_path / "in"


def rewrite(folder, change):
    """Gives a folder's tensors to `change` and writes what it returns."""
    from safetensors import numpy as safetensors

    file = folder / "model.safetensors"
    safetensors.save_file(change(safetensors.load_file(file)), file)


def test_read_lists_all_mismatched_tensors(folder):
    def change(tensors):
        tensors["extra"] = tensors.pop("quant_conv.bias")
        tensors["decoder.conv_out.bias"] = np.zeros(4, np.float32)
        return tensors

    rewrite(folder, change)
    with pytest.raises(UserError) as caught:
        weights.read(folder)
    for part in (
        f"{folder}/model.safetensors: not the tensors of this network",
        "1 missing (quant_conv.bias [4])",
        "1 unexpected (extra [4])",
        "1 of another shape (decoder.conv_out.bias [4], expected [3])",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "vqgan.", "module._orig_mod."])
def test_read_drops_a_prefix_that_all_names_share(folder, prefix, caplog):
    expected = weights.read(folder)
    rewrite(folder, lambda tensors: {f"{prefix}{name}": x for name, x in tensors.items()})
    with caplog.at_level("INFO", "lvm"):
        check_same(weights.read(folder), expected)
    assert f"prefix: {prefix}" in caplog.text
    rewrite(folder, lambda tensors: tensors | {"loss.scale": np.ones(1, np.float32)})
    with pytest.raises(UserError, match=r"unexpected \(.*loss\.scale"):
        weights.read(folder)


def test_read_open_muse_maskgit(tmp_path):
    """With the fields of its published config.json, and with `variant` as earlier exports have it."""
    original = random_weights(small("maskgit", **TINY), mode="center_crop")
    weights.write(tmp_path / "in", original, "torch")
    path = tmp_path / "in" / "config.json"
    published = {
        "_class_name": "MaskGitVQGAN", "_version": "0.0.1", "attn_resolutions": [16], "channel_mult": [1, 2],
        "commitment_cost": 0.25, "dropout": 0.0, "hidden_channels": 32, "num_channels": 3, "num_embeddings": 16,
        "num_res_blocks": 2, "quantized_embed_dim": 4, "resample_with_conv": True, "resolution": 16, "z_channels": 4,
    }  # fmt: skip
    assert files.read_json(path) | {"_version": "0.0.1", "attn_resolutions": [16]} == published
    for fields in (published, {"variant": "maskgit", "channels": 32, **TINY}):
        files.write_json(path, fields)
        check_same(weights.read(tmp_path / "in"), original)
    files.write_json(path, published | {"num_res_blocks": 3})
    with pytest.raises(UserError, match=r"36 missing \(decoder\.mid\.2\.conv1"):
        weights.read(tmp_path / "in")


def test_read_widens_half_precision_and_logs_it(folder, caplog):
    rewrite(folder, lambda tensors: {name: x.astype(np.float16) for name, x in tensors.items()})
    stored = weights.read(folder)
    assert "tensors in float16 are widened to float32" in caplog.text
    assert {leaf.dtype for leaf in jax.tree.leaves(stored.params)} == {np.dtype(np.float32)}
    rewrite(folder, lambda tensors: tensors | {"quant_conv.bias": np.zeros(4, np.float64)})
    with pytest.raises(UserError, match=r"quant_conv.bias float64; expected float32"):
        weights.read(folder)


def change_config(folder, changes):
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v != "leave out"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_attn_mid_block": False}, "no_attn_mid_block: False, expected True"),
        ({"no_attn_mid_block": "leave out"}, "no_attn_mid_block: False, expected True"),
        ({"attn_resolutions": [8]}, r"attn_resolutions: \[8\], expected none of \[16, 8\]"),
        ({"num_embeddings": "leave out"}, "num_embeddings is missing"),
        ({"quantized_embed_dim": 5}, "quantized_embed_dim: 5, expected 4"),
        ({"decoder_res_blocks": 4}, "decoder_res_blocks: 4, expected None"),
        ({"channel_mult": "1,2"}, "channel_multipliers: '1,2' is not a tuple"),
        ({"num_res_blocks": None}, "encoder_blocks: None"),
        ({"_class_name": "AutoencoderKL"}, "not a tokenizer's: .*expected kind"),
        ({"_class_name": "leave out", "variant": "vqvae"}, "variant: 'vqvae' beside a safetensors file"),
    ],
)
def test_read_names_unsupported_fields_of_muse(folder, changes, message):
    change_config(folder, changes)
    with pytest.raises(UserError, match=message) as caught:
        weights.read(folder)
    assert f"{folder}/config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mid_block_add_attention": "leave out"}, "mid_block_add_attention: True, expected False"),
        ({"block_out_channels": []}, r"block_out_channels: \[\], expected the channels of each stage"),
        ({"vq_embed_dim": 7}, "vq_embed_dim: 7, expected 4"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types"),
        ({"act_fn": "relu"}, "act_fn: 'relu', expected 'silu'"),
    ],
)
def test_read_names_unsupported_fields_of_diffusers(tmp_path, changes, message):
    weights.write(tmp_path / "in", random_weights(small("lvm", **TINY)), "diffusers")
    change_config(tmp_path / "in", changes)
    with pytest.raises(UserError, match=message):
        weights.read(tmp_path / "in")


def test_preprocess_defaults_to_the_authors(folder, tmp_path):
    (folder / "preprocess.json").unlink()
    assert weights.read(folder).preprocess == Preprocess(16, "squash", icc="ignore")
    weights.write(tmp_path / "maskgit", random_weights(small("maskgit", **TINY)), "maskgit")
    (tmp_path / "maskgit" / "preprocess.json").unlink()
    assert weights.read(tmp_path / "maskgit").preprocess == Preprocess(16, "center_crop", icc="ignore")
    files.write_json(folder / "preprocess.json", Preprocess(32).to_json())
    with pytest.raises(UserError, match=r"resolution: 32, config\.json says 16"):
        weights.read(folder)


@pytest.mark.parametrize("kind", ["torch", "diffusers"])
def test_export_has_all_of_the_preprocessing(tmp_path, kind):
    original = random_weights(small("lvm", **TINY), mode="center_crop", filter="lanczos")
    weights.write(tmp_path / "out", original, kind)
    path = tmp_path / "out" / "preprocess.json"
    assert files.read_json(path) == {
        "resolution": 16, "mode": "center_crop", "filter": "lanczos", "decode": "full", "resizer": "pillow",
        "icc": "srgb", "colours": "0..1", "mean": [0, 0, 0], "std": [1, 1, 1],
    }  # fmt: skip
    check_same(weights.read(tmp_path / "out"), original)
    files.write_json(path, files.read_json(path) | {"mean": [0.5, 0.5, 0.5]})
    with pytest.raises(UserError, match=r"preprocess\.json: preprocess\.mean=\[0\.5, 0\.5, 0\.5\] is not supp"):
        weights.read(tmp_path / "out")


def test_read_bare_file_with_variant(tmp_path):
    original = random_weights(small("maskgit", **TINY), mode="center_crop", icc="ignore")
    weights.write(tmp_path / "in", original, "maskgit")
    tree = flax.serialization.msgpack_restore((tmp_path / "in" / "tokenizer.msgpack").read_bytes())
    bare = tmp_path / "bare"
    bare.mkdir()
    file = bare / "tokenizer_imagenet256_checkpoint"
    file.write_bytes(flax.serialization.msgpack_serialize(tree["params"]))
    with pytest.raises(UserError, match=r"bare: config\.json is missing; .* needs a small one beside it"):
        weights.read(file)
    sizes = {name: value for name, value in TINY.items() if name != "resolution"}
    files.write_json(bare / "config.json", {"variant": "maskgit", "resolution": 16, "channels": 32, **sizes})
    for source in (file, bare):
        check_same(weights.read(source), original)
    (bare / "other.pth").touch()
    with pytest.raises(UserError, match=r"weights files: other.pth, tokenizer_imagenet256_checkpoint; expected one"):
        weights.read(bare)
    file.write_bytes(b"\x93 no weights")
    with pytest.raises(UserError, match=r"not weights in msgpack, safetensors or torch's format"):
        weights.read(file)
    change_config(bare, {"depth": 3})
    with pytest.raises(UserError, match="depth: no such key; expected variant and any of resolution"):
        weights.read(file)


def test_load_gives_same_codes_from_every_layout(tmp_path):
    original = random_weights(small("lvm", **TINY))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    loaded = []
    for kind in kinds_of("lvm"):
        weights.write(tmp_path / kind, original, kind)
        tokenizer = Tokenizer.load(tmp_path / kind)
        loaded.append((tokenizer.identity(), tokenizer.encode(images).tolist()))
    assert loaded[0] == loaded[1] == loaded[2]
    assert Tokenizer.load(tmp_path / "torch", dtype="bfloat16").config.compute_dtype == "bfloat16"


@pytest.mark.parametrize(("variant", "kind"), [("lvm", "orbax"), ("lvm", "torch"), ("maskgit", "maskgit")])
def test_weights_that_are_not_finite_are_refused(variant, kind, tmp_path):
    original = random_weights(small(variant, **TINY))
    codebook = np.where(np.arange(64).reshape(16, 4) == 9, np.nan, original.params["codebook"])
    weights.write(tmp_path / "x", dataclasses.replace(original, params=original.params | {"codebook": codebook}), kind)
    with pytest.raises(UserError, match=r"x: codebook: 1 of 64 values are NaN or infinite"):
        Tokenizer.load(tmp_path / "x")


def test_identity_covers_weights_network_preprocess():
    original = random_weights(small("lvm", **TINY))
    changed = original.params | {"codebook": np.nextafter(original.params["codebook"], np.float32(9))}
    others = [
        dataclasses.replace(original, params=changed),
        dataclasses.replace(original, config=dataclasses.replace(original.config, quantizer=L2VQ())),
        dataclasses.replace(original, preprocess=Preprocess(16, "center_crop")),
        dataclasses.replace(original, preprocess=Preprocess(16, icc="ignore")),
        dataclasses.replace(original, preprocess=Preprocess(16, filter="lanczos")),
    ]
    identities = [Tokenizer(w.config, w.preprocess, w.params).identity() for w in (original, *others)]
    assert len({identity["hash"] for identity in identities}) == 6
    assert len({identity["weights"] for identity in identities}) == 2
    assert len({identity["codes"] for identity in identities}) == 6
    assert identities[0]["preprocess"]["colours"] == "0..1"


def test_tuned_decoder_has_the_same_codes():
    original = random_weights(small("lvm", **TINY))
    tuned = {
        name: jax.tree.map(lambda x: x * np.float32(1.5), tree) if name in ("decoder", "post_quant_conv") else tree
        for name, tree in original.params.items()
    }
    first, second = (
        Tokenizer(original.config, original.preprocess, params).identity() for params in (original.params, tuned)
    )
    assert first["hash"] != second["hash"]
    assert first["codes"] == second["codes"] != first["hash"]
    assert same_codes(first, second)
    for name in ("encoder", "quant_conv", "codebook"):
        other = original.params | {name: jax.tree.map(lambda x: x * np.float32(1.5), original.params[name])}
        assert not same_codes(first, Tokenizer(original.config, original.preprocess, other).identity())
