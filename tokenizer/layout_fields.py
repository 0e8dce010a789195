"""Fields of the config.json beside published tokenizer weights, and our settings of the same network.

Every field that changes the network is read, and a value that is not supported is an error. Functions from_… raise
UserError naming the file and the field; `tokenizer.weights` reads back what a to_… function writes, to detect what
the format cannot express.
"""

import math
from collections.abc import Mapping
from typing import Any

from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from tokenizer.network import VARIANTS, VQGANConfig

Fields = Mapping[str, Any]  # of a config.json

# Fields in which a network of a published variant may differ from it.
SIZE_FIELDS = (
    "resolution", "channels", "channel_multipliers", "encoder_blocks", "decoder_blocks", "middle_blocks",
    "codebook_size", "codebook_dim", "norm_groups",
)  # fmt: skip


def variant_of(config: VQGANConfig) -> str | None:
    """The variant that a network is, at any size; None for networks that were not published."""
    return next((name for name, fields in _differences(config).items() if not fields), None)


def nearest_variant(config: VQGANConfig) -> str:
    """The published variant with the fewest other fields, and these: `maskgit has norm: 'group', not 'batch'`."""
    name, fields = min(_differences(config).items(), key=lambda item: len(item[1]))
    return f"{name} has {', '.join(fields)}"


def _differences(config: VQGANConfig) -> dict[str, list[str]]:
    """Fields besides sizes in which each published variant differs from a network, as text."""
    fields = {name: value for name, value in config.describe().items() if name not in SIZE_FIELDS}
    published = {name: net.describe() for name, net in VARIANTS.items()}
    return {
        name: [f"{key}: {net.get(key)!r}, not {value!r}" for key, value in fields.items() if net.get(key) != value]
        for name, net in published.items()
    }


def to_variant_fields(config: VQGANConfig) -> dict[str, Any]:
    """Fields of our own small config.json for a weights file."""
    return {"variant": variant_of(config)} | {name: to_json(getattr(config, name)) for name in SIZE_FIELDS}


def from_variant_fields(fields: Fields, where: str) -> VQGANConfig:
    """The network of such a config.json: a variant, and the sizes that differ from the published one's."""
    sizes = {name: value for name, value in fields.items() if name != "variant"}
    if fields.get("variant") not in VARIANTS:
        raise UserError(f"{where}: variant: {fields.get('variant')!r}, expected one of {', '.join(VARIANTS)}")
    for name in sizes:
        if name not in SIZE_FIELDS:
            raise UserError(f"{where}: {name}: no such key; expected variant and any of {', '.join(SIZE_FIELDS)}")
    return from_config_dict(VQGANConfig, to_json(VARIANTS[fields["variant"]]) | sizes, where)


_BLOCKS = ("decoder_blocks", "middle_blocks")
# Per class: fields → ours, and the fields of which one value is supported → (value, default of the class).
_MUSE = {
    "resolution": "resolution",
    "hidden_channels": "channels",
    "channel_mult": "channel_multipliers",
    "num_res_blocks": "encoder_blocks",
    "num_embeddings": "codebook_size",
    "z_channels": "codebook_dim",
}
_MUSE_DECODER = ("decoder_res_blocks", "decoder_hidden_channels", "decoder_channel_mult", "extra_mid_res_blocks")
_MUSE_FIXED = {"num_channels": (3, 3), "resample_with_conv": (True, True)}
_MUSE_CLASSES = {  # variant → class, and its own fields
    "lvm": ("VQGANModel", {"no_attn_mid_block": (True, False)} | dict.fromkeys(_MUSE_DECODER, (None, None))),
    "maskgit": ("MaskGitVQGAN", {}),
}
_DIFFUSERS = {
    "sample_size": "resolution",
    "layers_per_block": "encoder_blocks",
    "num_vq_embeddings": "codebook_size",
    "latent_channels": "codebook_dim",
}
_DIFFUSERS_FIXED = {
    "in_channels": (3, 3),
    "out_channels": (3, 3),
    "act_fn": ("silu", "silu"),
    "norm_type": ("group", "group"),
    "mid_block_add_attention": (False, True),
}


def to_muse(config: VQGANConfig) -> dict[str, Any]:
    """Fields of open-muse's `VQGANModel` or `MaskGitVQGAN`."""
    class_name, fixed = _MUSE_CLASSES[variant_of(config) or ""]
    return {
        "_class_name": class_name,
        "attn_resolutions": [],
        "quantized_embed_dim": config.codebook_dim,
        "dropout": 0.0,
        "commitment_cost": 0.25,
    } | _to_fields(config, _MUSE, _MUSE_FIXED | fixed)


def from_muse(fields: Fields, where: str) -> VQGANConfig:
    """The network of open-muse's `VQGANModel` or `MaskGitVQGAN`."""
    variant = next(variant for variant, (name, _) in _MUSE_CLASSES.items() if name == fields["_class_name"])
    values = {ours: _require(fields, theirs, where) for theirs, ours in _MUSE.items()}
    fixed = _MUSE_FIXED | _MUSE_CLASSES[variant][1]
    _expect(fields, fixed | {"quantized_embed_dim": (values["codebook_dim"], 256)}, where)
    config = _network(variant, values, where)
    if config.channel_multipliers[0] != 1:  # its first convolution has hidden_channels whatever the multiplier
        raise UserError(f"{where}: channel_mult: {list(config.channel_multipliers)}, expected 1 as the first")
    if variant == "maskgit":  # a class without attention, whatever `attn_resolutions` says
        return config
    sides = [config.resolution >> i for i in range(len(config.widths))]
    attention = fields.get("attn_resolutions", (16,))
    if not isinstance(attention, list | tuple) or set(attention) & set(sides):
        raise UserError(
            f"{where}: attn_resolutions: {attention!r}, expected none of {sides}: attention is not supported"
        )
    return config


def to_diffusers(config: VQGANConfig) -> dict[str, Any]:
    """Fields of diffusers' `VQModel`."""
    return {
        "_class_name": "VQModel",
        "down_block_types": ["DownEncoderBlock2D"] * len(config.widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.widths),
        "block_out_channels": list(config.widths),
        "norm_num_groups": config.norm_groups,
        "vq_embed_dim": None,
        "lookup_from_codebook": True,
    } | _to_fields(config, _DIFFUSERS, _DIFFUSERS_FIXED)


def from_diffusers(fields: Fields, where: str) -> VQGANConfig:
    """The network of diffusers' `VQModel`."""
    widths = _require(fields, "block_out_channels", where)
    if not isinstance(widths, list) or not widths or not all(isinstance(w, int) and w > 0 for w in widths):
        raise UserError(f"{where}: block_out_channels: {widths!r}, expected the channels of each stage")
    channels = math.gcd(*widths)
    values = {ours: _require(fields, theirs, where) for theirs, ours in _DIFFUSERS.items()}
    fixed = _DIFFUSERS_FIXED | {
        "down_block_types": (["DownEncoderBlock2D"] * len(widths), ["DownEncoderBlock2D"]),
        "up_block_types": (["UpDecoderBlock2D"] * len(widths), ["UpDecoderBlock2D"]),
    }
    if fields.get("vq_embed_dim") is not None:
        fixed["vq_embed_dim"] = (values["codebook_dim"], None)
    _expect(fields, fixed, where)
    values |= {
        "channels": channels,
        "channel_multipliers": [width // channels for width in widths],
        "norm_groups": fields.get("norm_num_groups", 32),
    }
    return _network("lvm", values, where)


def _to_fields(config: VQGANConfig, names: Mapping[str, str], fixed: Mapping[str, Any]) -> dict[str, Any]:
    values = {theirs: to_json(getattr(config, ours)) for theirs, ours in names.items()}
    return values | {name: value for name, (value, _) in fixed.items()}


def _network(variant: str, values: dict[str, Any], where: str) -> VQGANConfig:
    """A network of a variant: the decoder of "lvm" has a block more per stage, "maskgit" as many everywhere."""
    blocks = values["encoder_blocks"]
    if type(blocks) is int:  # from_config_dict rejects anything else
        is_lvm = variant == "lvm"
        values = values | ({"decoder_blocks": blocks + 1} if is_lvm else dict.fromkeys(_BLOCKS, blocks))
    return from_config_dict(VQGANConfig, to_json(VARIANTS[variant]) | values, where)


def _require(fields: Fields, name: str, where: str) -> Any:
    if name not in fields:
        raise UserError(f"{where}: {name} is missing; the class's default is not the checkpoint's value")
    return fields[name]


def _expect(fields: Fields, fixed: Mapping[str, tuple[Any, Any]], where: str) -> None:
    """Checks fields, or the class's defaults of missing ones, against the only supported values."""
    for name, (expected, default) in fixed.items():
        value = fields.get(name, default)
        if value != expected:
            raise UserError(f"{where}: {name}: {value!r}, expected {expected!r}: other networks are not supported")
