"""Tokenizers through files: every chain of layouts gives the same bits back, and what doesn't fit is named."""

import dataclasses
import itertools
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
from tests.tokenizer.networks import check_same, random_weights, small
from tokenizer import Tokenizer, layouts, weights
from tokenizer.layout_fields import variant_of
from tokenizer.network import VARIANTS, VQGANConfig

pytest.importorskip("safetensors")
TINY = {"resolution": 16, "channel_multipliers": (1, 2), "codebook_size": 16, "codebook_dim": 4}
OWN = VQGANConfig(
    resolution=16, patch_size=4, channels=8, channel_multipliers=(1,), encoder_blocks=1, decoder_blocks=1,
    middle_blocks=0, codebook_size=16, codebook_dim=4, norm_groups=4, quant_convs=False, l2_normalize=True,
)  # fmt: skip


def kinds_of(variant):
    return ["orbax", *layouts.layout_kinds(variant)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_published_networks_have_the_names_that_their_files_have(variant):
    config = VARIANTS[variant]
    for kind in layouts.layout_kinds(variant):
        names = layouts.find_layout(variant, kind).tensors(config)
        assert len(names) == len({path for path, _ in names.values()})
        shapes = {name: shape for name, (_, shape) in names.items()}
        for name, shape in PUBLISHED[variant, kind].items():
            assert shapes[name] == shape, name


PUBLISHED = {
    ("maskgit", "maskgit"): {
        "encoder.Conv_0.kernel": (3, 3, 3, 128),
        "encoder.ResBlock_9.Conv_1.kernel": (3, 3, 512, 512),
        "encoder.ResBlock_8.Conv_2.kernel": (1, 1, 512, 512),  # of its own output
        "encoder.ResBlock_11.GroupNorm_0.scale": (512,),
        "encoder.Conv_1.kernel": (1, 1, 512, 256),
        "decoder.ResBlock_1.Conv_0.kernel": (3, 3, 512, 512),
        "decoder.ResBlock_4.Conv_2.kernel": (1, 1, 256, 256),
        "decoder.Conv_4.kernel": (3, 3, 128, 128),
        "decoder.Conv_5.bias": (3,),
        "decoder.GroupNorm_0.bias": (128,),
        "quantizer.codebook": (1024, 256),
    },
    ("maskgit", "torch"): {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.4.block.0.nin_shortcut.weight": (512, 512, 1, 1),
        "encoder.mid.1.norm2.bias": (512,),
        "decoder.up.3.block.0.conv1.weight": (256, 512, 3, 3),
        "decoder.up.4.upsample_conv.weight": (512, 512, 3, 3),
        "decoder.up.1.upsample_conv.bias": (128,),
        "quantize.embedding.weight": (1024, 256),
    },
    ("lvm_old", "torch"): {
        "encoder.conv1.weight": (128, 3, 3, 3),
        "encoder.blocks.4.conv_out.weight": (256, 128, 1, 1),
        "encoder.blocks.11.norm1.weight": (512,),
        "encoder.norm1.weight": (512,),
        "encoder.conv2.weight": (32, 512, 1, 1),
        "quantizer.embedding.weight": (8192, 32),
        "decoder.conv1.weight": (512, 32, 3, 3),
        "decoder.blocks.4.conv_out.weight": (256, 512, 1, 1),
        "decoder.up_convs.0.weight": (2048, 512, 3, 3),
        "decoder.up_convs.3.bias": (512,),
        "decoder.conv6.weight": (3, 128, 3, 3),
    },
    ("lvm", "torch"): {
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.3.downsample.conv.weight": (512, 512, 3, 3),
        "encoder.mid.block_2.conv2.bias": (768,),
        "encoder.conv_out.weight": (64, 768, 3, 3),
        "quant_conv.weight": (64, 64, 1, 1),
        "post_quant_conv.bias": (64,),
        "decoder.up.4.block.2.conv1.weight": (768, 768, 3, 3),
        "decoder.up.3.block.0.nin_shortcut.weight": (512, 768, 1, 1),
        "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
        "decoder.norm_out.weight": (128,),
        "quantize.embedding.weight": (8192, 64),
    },
    ("lvm", "diffusers"): {
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
        "encoder.down_blocks.3.downsamplers.0.conv.weight": (512, 512, 3, 3),
        "encoder.mid_block.resnets.1.conv2.bias": (768,),
        "encoder.conv_norm_out.weight": (768,),
        "decoder.up_blocks.0.resnets.2.conv1.weight": (768, 768, 3, 3),
        "decoder.up_blocks.1.resnets.0.conv_shortcut.weight": (512, 768, 1, 1),
        "decoder.up_blocks.3.upsamplers.0.conv.weight": (256, 256, 3, 3),
        "quantize.embedding.weight": (8192, 64),
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_chain_of_layouts_gives_the_same_bits(variant, tmp_path):
    wanted = random_weights(small(variant, **TINY), mode="center_crop", filter="lanczos")
    folders = {}
    for kind in kinds_of(variant):
        folders[kind] = tmp_path / kind
        weights.write(folders[kind], wanted, kind)
        check_same(weights.read(folders[kind]), wanted)
    for source, target in itertools.product(
        folders, folders
    ):  # every step is exact, so every chain of them is
        folder = tmp_path / f"{source}-{target}"
        weights.write(folder, weights.read(folders[source]), target)
        check_same(weights.read(folder), wanted)


@st.composite
def networks(draw):
    variant = draw(st.sampled_from(sorted(VARIANTS)))
    stages = draw(st.integers(1, 3))
    blocks = draw(st.integers(1, 2))
    free = variant != "lvm"  # whose layouts tell one number of blocks, and no groups
    return small(
        variant,
        resolution=2 ** (stages - 1) * draw(st.integers(1, 5)),
        channels=draw(st.sampled_from([8, 16, 24] if free else [32, 64])),
        channel_multipliers=(1, *draw(st.lists(st.integers(1, 3), min_size=stages - 1, max_size=stages - 1))),
        encoder_blocks=blocks,
        decoder_blocks=draw(st.integers(1, 3)) if free else blocks + 1,
        middle_blocks=draw(st.integers(0, 3)) if free else 2,
        codebook_size=draw(st.integers(1, 40)),
        codebook_dim=draw(st.integers(1, 9)),
        norm_groups=draw(st.sampled_from([1, 4, 8])) if free else 32,
    )


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(config=networks(), seed=st.integers(0, 99), data=st.data())
def test_networks_of_any_size_survive_any_chain(config, seed, data):
    wanted = random_weights(config, seed)
    chain = data.draw(
        st.lists(st.sampled_from(layouts.layout_kinds(variant_of(config))), min_size=1, max_size=3)
    )
    found = wanted
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(chain):
            weights.write(f"{folder}/{number}", found, kind)
            found = weights.read(f"{folder}/{number}")
            check_same(found, wanted)


def test_a_network_of_our_own_has_our_layout_alone(tmp_path):
    wanted = random_weights(OWN)
    weights.write(tmp_path / "ours", wanted, "orbax")
    check_same(weights.read(tmp_path / "ours"), wanted)
    with pytest.raises(
        UserError, match="a network of our own has no layout 'torch'; it can be written as orbax"
    ):
        weights.write(tmp_path / "torch", wanted, "torch")


@pytest.mark.parametrize(
    ("variant", "kind", "message"),
    [
        ("maskgit", "diffusers", "variant maskgit has no layout 'diffusers'; .* as orbax, torch, maskgit"),
        ("lvm_old", "maskgit", "variant lvm_old has no layout 'maskgit'; .* as orbax, torch"),
        ("lvm", "maskgit", "variant lvm has no layout 'maskgit'; .* as orbax, torch, diffusers"),
    ],
)
def test_a_pair_without_a_common_layout_is_refused(variant, kind, message, tmp_path):
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
def test_what_a_layout_cant_tell_is_refused(sizes, kind, message, tmp_path):
    with pytest.raises(UserError, match=message):
        weights.write(tmp_path / "out", random_weights(small("lvm", **{**TINY, **sizes})), kind)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    wanted = random_weights(small("maskgit", **TINY))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UserError, match="full: exists and isn't an empty folder"):
        weights.write(tmp_path / "full", wanted, "torch")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(weights.files, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        weights.write(tmp_path / "out", wanted, "torch")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# --- Reading what others wrote ------------------------------------------------------------------------------------


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


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(folder):
    def change(found):
        found["extra"] = found.pop("quant_conv.bias")
        found["decoder.conv_out.bias"] = np.zeros(4, np.float32)
        return found

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


def test_half_precision_is_widened_aloud_and_other_types_are_refused(folder, caplog):
    rewrite(folder, lambda found: {name: x.astype(np.float16) for name, x in found.items()})
    found = weights.read(folder)
    assert "tensors in float16 are widened to float32" in caplog.text
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype(np.float32)}
    rewrite(folder, lambda found: found | {"quant_conv.bias": np.zeros(4, np.float64)})
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
def test_a_config_of_another_network_is_refused_by_its_field(folder, changes, message):
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
def test_another_vqmodel_is_refused_by_its_field(tmp_path, changes, message):
    weights.write(tmp_path / "in", random_weights(small("lvm", **TINY)), "diffusers")
    change_config(tmp_path / "in", changes)
    with pytest.raises(UserError, match=message):
        weights.read(tmp_path / "in")


def test_without_a_preprocess_it_is_the_authors_own(folder, tmp_path):
    (folder / "preprocess.json").unlink()
    assert weights.read(folder).preprocess == Preprocess(16, "squash")
    weights.write(tmp_path / "maskgit", random_weights(small("maskgit", **TINY)), "maskgit")
    (tmp_path / "maskgit" / "preprocess.json").unlink()
    assert weights.read(tmp_path / "maskgit").preprocess == Preprocess(16, "center_crop")
    files.write_json(folder / "preprocess.json", Preprocess(32).to_json())
    with pytest.raises(UserError, match=r"resolution: 32, config\.json says 16"):
        weights.read(folder)


def test_a_bare_file_with_a_variant_beside_it(tmp_path):
    wanted = random_weights(small("maskgit", **TINY), mode="center_crop")
    weights.write(tmp_path / "in", wanted, "maskgit")
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
        check_same(weights.read(source), wanted)
    (bare / "other.pth").touch()
    with pytest.raises(
        UserError, match=r"weights files: other.pth, tokenizer_imagenet256_checkpoint; expected one"
    ):
        weights.read(bare)
    file.write_bytes(b"\x93 no weights")
    with pytest.raises(UserError, match=r"not weights in msgpack, safetensors or torch's format"):
        weights.read(file)
    change_config(bare, {"depth": 3})
    with pytest.raises(UserError, match="depth: no such key; expected variant and any of resolution"):
        weights.read(file)


def test_load_takes_every_kind_of_folder_and_gives_the_same_codes(tmp_path):
    wanted = random_weights(small("lvm", **TINY))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    found = []
    for kind in kinds_of("lvm"):
        weights.write(tmp_path / kind, wanted, kind)
        tokenizer = Tokenizer.load(tmp_path / kind)
        found.append((tokenizer.identity(), tokenizer.encode(images).tolist()))
    assert found[0] == found[1] == found[2]
    assert Tokenizer.load(tmp_path / "torch", dtype="bfloat16").config.compute_dtype == "bfloat16"


def test_the_identity_tells_weights_network_and_preprocessing_apart():
    wanted = random_weights(small("lvm", **TINY))
    numbers = wanted.params | {"codebook": np.nextafter(wanted.params["codebook"], np.float32(9))}
    others = [
        dataclasses.replace(wanted, params=numbers),
        dataclasses.replace(wanted, config=dataclasses.replace(wanted.config, l2_normalize=True)),
        dataclasses.replace(wanted, preprocess=Preprocess(16, "center_crop")),
        dataclasses.replace(wanted, preprocess=Preprocess(16, filter="lanczos")),
    ]
    identities = [Tokenizer(w.config, w.preprocess, w.params).identity() for w in (wanted, *others)]
    assert len({identity["hash"] for identity in identities}) == 5
    assert len({identity["weights"] for identity in identities}) == 2
    assert identities[0]["preprocess"]["colours"] == "0..1"
