"""What the config.json beside a tokenizer's published weights says: their fields, and ours of the same network.

Every field that changes the network is read; one whose value would need another network is an error. Functions
from_… raise UserError naming the file and the field; what a to_… can't tell is found by reading it back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from tokenizer.network import VARIANTS, VQGANConfig

Fields = Mapping[str, Any]  # of a config.json

# What may differ from the published network and still be the same variant.
SIZE_FIELDS = (
    "resolution", "channels", "channel_multipliers", "encoder_blocks", "decoder_blocks", "middle_blocks",
    "codebook_size", "codebook_dim", "norm_groups",
)  # fmt: skip


def variant_of(config: VQGANConfig) -> str | None:
    """Which of `VARIANTS` a network is, whatever its sizes; None for one of our own."""
    of_kind = {
        name: value for name, value in to_json(config).items() if name not in (*SIZE_FIELDS, "compute_dtype")
    }
    for variant, published in VARIANTS.items():
        if of_kind.items() <= to_json(published).items():
            return variant
    return None


def to_variant_fields(config: VQGANConfig) -> dict[str, Any]:
    """Our small config.json beside a bare weights file."""
    return {"variant": variant_of(config)} | {name: to_json(getattr(config, name)) for name in SIZE_FIELDS}


def from_variant_fields(fields: Fields, where: str) -> VQGANConfig:
    """The network of a small config.json: a variant, and what differs from the published one."""
    sizes = {name: value for name, value in fields.items() if name != "variant"}
    if fields.get("variant") not in VARIANTS:
        raise UserError(f"{where}: variant: {fields.get('variant')!r}, expected one of {', '.join(VARIANTS)}")
    for name in sizes:
        if name not in SIZE_FIELDS:
            raise UserError(
                f"{where}: {name}: no such key; expected variant and any of {', '.join(SIZE_FIELDS)}"
            )
    published = to_json(VARIANTS[fields["variant"]])
    return from_config_dict(VQGANConfig, published | sizes, where)


_MUSE = {
    "resolution": "resolution",
    "hidden_channels": "channels",
    "channel_mult": "channel_multipliers",
    "num_res_blocks": "encoder_blocks",
    "num_embeddings": "codebook_size",
    "z_channels": "codebook_dim",
}  # fields of open-muse's VQGANModel → ours


def to_muse(config: VQGANConfig) -> dict[str, Any]:
    """The config.json of open-muse's `VQGANModel`."""
    return {
        "_class_name": "VQGANModel",
        "num_channels": 3,
        "attn_resolutions": [],
        "no_attn_mid_block": True,
        "quantized_embed_dim": config.codebook_dim,
        "dropout": 0.0,
        "resample_with_conv": True,
        "commitment_cost": 0.25,
    } | {theirs: to_json(getattr(config, ours)) for theirs, ours in _MUSE.items()}


def from_muse(fields: Fields, where: str) -> VQGANConfig:
    """The network of such a config.json."""
    values = {ours: _needed(fields, theirs, where) for theirs, ours in _MUSE.items()}
    # What is left out has the class's default, which has attention.
    _expect(fields, "no_attn_mid_block", True, False, where)
    _expect(fields, "resample_with_conv", True, True, where)
    _expect(fields, "num_channels", 3, 3, where)
    _expect(fields, "quantized_embed_dim", values["codebook_dim"], 256, where)
    for part in ("res_blocks", "hidden_channels", "channel_mult"):
        _expect(fields, f"decoder_{part}", None, None, where)
    _expect(fields, "extra_mid_res_blocks", None, None, where)
    values["decoder_blocks"] = _one_more(values["encoder_blocks"])
    config = from_config_dict(VQGANConfig, to_json(VARIANTS["lvm"]) | values, where)
    if (
        config.channel_multipliers[0] != 1
    ):  # there, the first convolution has hidden_channels whatever they are
        raise UserError(f"{where}: channel_mult: {list(config.channel_multipliers)}, expected 1 as the first")
    sides = [config.resolution >> i for i in range(len(config.widths))]
    attention = fields.get("attn_resolutions", (16,))
    if not isinstance(attention, list | tuple) or set(attention) & set(sides):
        raise UserError(
            f"{where}: attn_resolutions: {attention!r}, expected none of {sides}: no attention is built"
        )
    return config


def to_diffusers(config: VQGANConfig) -> dict[str, Any]:
    """The config.json of diffusers' `VQModel`."""
    stages = len(config.widths)
    return {
        "_class_name": "VQModel",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.encoder_blocks,
        "act_fn": "silu",
        "latent_channels": config.codebook_dim,
        "sample_size": config.resolution,
        "num_vq_embeddings": config.codebook_size,
        "norm_num_groups": config.norm_groups,
        "vq_embed_dim": None,
        "norm_type": "group",
        "mid_block_add_attention": False,
        "lookup_from_codebook": True,
    }


def from_diffusers(fields: Fields, where: str) -> VQGANConfig:
    """The network of such a config.json."""
    widths = _needed(fields, "block_out_channels", where)
    if not isinstance(widths, list) or not widths or not all(isinstance(w, int) and w > 0 for w in widths):
        raise UserError(f"{where}: block_out_channels: {widths!r}, expected the channels of each stage")
    channels = math.gcd(*widths)
    latent = _needed(fields, "latent_channels", where)
    for name, right, default in (
        ("in_channels", 3, 3),
        ("out_channels", 3, 3),
        ("act_fn", "silu", "silu"),
        ("norm_type", "group", "group"),
        ("mid_block_add_attention", False, True),
        ("down_block_types", ["DownEncoderBlock2D"] * len(widths), ["DownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"] * len(widths), ["UpDecoderBlock2D"]),
    ):
        _expect(fields, name, right, default, where)
    if fields.get("vq_embed_dim") not in (None, latent):
        _expect(fields, "vq_embed_dim", latent, None, where)
    blocks = _needed(fields, "layers_per_block", where)
    values = {
        "resolution": _needed(fields, "sample_size", where),
        "channels": channels,
        "channel_multipliers": [width // channels for width in widths],
        "encoder_blocks": blocks,
        "decoder_blocks": _one_more(blocks),
        "codebook_size": _needed(fields, "num_vq_embeddings", where),
        "codebook_dim": latent,
        "norm_groups": fields.get("norm_num_groups", 32),
    }
    return from_config_dict(VQGANConfig, to_json(VARIANTS["lvm"]) | values, where)


def _one_more(blocks: Any) -> Any:
    """The decoder's blocks a stage; what is no number is refused with the encoder's."""
    return blocks + 1 if type(blocks) is int else blocks


def _needed(fields: Fields, name: str, where: str) -> Any:
    if name not in fields:
        raise UserError(f"{where}: {name} is missing; the class's default isn't the checkpoint's")
    return fields[name]


def _expect(fields: Fields, name: str, right: Any, default: Any, where: str) -> None:
    """That a field, or the default of the class where it is left out, is what our network has."""
    found = fields.get(name, default)
    if found != right:
        raise UserError(f"{where}: {name}: {found!r}, expected {right!r}: another network isn't built")
