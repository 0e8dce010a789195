"""Layouts of published networks: names and shapes of tensors, the variant nearest to a network."""

import dataclasses
import re

import pytest

from tokenizer import layouts
from tokenizer.layout_fields import nearest_variant, variant_of
from tokenizer.network import VARIANTS
from tokenizer.quantizers.fsq import FSQ


@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts_have_published_names_and_shapes(variant):
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


def test_nearest_variant_names_the_fields_that_differ():
    network = dataclasses.replace(VARIANTS["lvm"], codebook_size=16, codebook_dim=4, quantizer=FSQ((2, 2, 2, 2)))
    assert variant_of(network) is None
    assert re.fullmatch(r"lvm has quantizer: None, not \{.*'fsq'.*\}", nearest_variant(network))
