"""The config.json beside a Llama's weights, transformers' or EasyLM's, and what we put beside it.

Every field that changes the network is read; one whose value would need another network is an error.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from lvm.common import files
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.interop.lazy_checkpoint import NO_RECORD, LazyCheckpoint
from lvm.model.transformer import ModelConfig
from lvm.training.workdir import current_record

RECORD = "lvm.json"  # what the training said of itself, beside weights in another format

_SIZES = {
    "vocab_size": "vocabulary_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "mlp_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}
# What a folder may leave out, with what their classes take then.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
# Of transformers' Llama: what must be so, also where it is left out.
_ONLY = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None, {"rope_type": "default"}, {"type": "default"}),
    "quantization_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class ConfigFormat:
    """Whose config.json it is: the name of the context's field."""

    context_field: str

    def to_fields(self, config: ModelConfig) -> dict[str, Any]:
        """The fields that both have, of a model."""
        values = {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()}
        return values | {"num_key_value_heads": config.kv_heads, self.context_field: config.context}


LLAMA = ConfigFormat("max_position_embeddings")
EASYLM = ConfigFormat("max_sequence_length")


def parse_config(
    fields: Mapping[str, Any], family: ConfigFormat, record: Mapping[str, Any], where: str
) -> ModelConfig:
    """The model of a config.json; what it doesn't tell is as in its training's record, or as by default.

    Raises:
      UserError: a size is missing or impossible, or a field asks for a network that isn't built.
    """
    _check_only(fields, where)
    values: dict[str, Any] = {}
    for theirs, ours in {**_SIZES, family.context_field: "context"}.items():
        if theirs == "num_key_value_heads":
            heads = fields.get(theirs)
            values[ours] = 0 if heads in (None, fields.get("num_attention_heads")) else heads
        elif theirs in fields or theirs in _DEFAULTS:
            values[ours] = fields.get(theirs, _DEFAULTS.get(theirs))
        else:
            raise UserError(f"{where}: {theirs} is missing; the class's default isn't the checkpoint's")
    values["rope_theta"] = _rope_theta(fields, where)
    before = record.get("config", {}).get("model", {})
    if before.get("num_kv_heads") == before.get("num_heads") and values["num_kv_heads"] == 0:
        values["num_kv_heads"] = before.get("num_kv_heads", 0)  # two ways of saying the same
    config: ModelConfig = from_config_dict(ModelConfig, before | values, where)
    if fields.get("head_dim") not in (None, config.head_dim):
        raise UserError(
            f"{where}: head_dim: {fields['head_dim']}, expected {config.head_dim}, hidden_size / heads"
        )
    if config.vocabulary_size < 1:
        raise UserError(f"{where}: vocab_size: {config.vocabulary_size} is not positive")
    return config


def _check_only(fields: Mapping[str, Any], where: str) -> None:
    for name, right in _ONLY.items():
        if name in fields and fields[name] not in right:
            raise UserError(
                f"{where}: {name}: {fields[name]!r}, expected {right[0]!r}: another network isn't built"
            )


def _rope_theta(fields: Mapping[str, Any], where: str) -> float:
    """transformers 5 has it in `rope_parameters`, 4 beside the other fields."""
    rope = fields.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise UserError(
            f"{where}: rope_parameters: {rope!r}, expected rope_type 'default': no other is built"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{where}: rope_parameters: {rope!r}, expected partial_rotary_factor 1: whole heads turn"
        )
    found = [value for value in (rope.get("rope_theta"), fields.get("rope_theta")) if value is not None]
    if len(set(found)) > 1:
        raise UserError(f"{where}: rope_theta: {found[1]!r}, but rope_parameters say {found[0]!r}")
    return found[0] if found else _DEFAULTS["rope_theta"]


def write_record(folder: pathlib.Path, checkpoint: LazyCheckpoint) -> None:
    """Writes the vocabulary, and what the training said of itself."""
    checkpoint.vocabulary.save(folder)
    record = dict(checkpoint.record)
    record["config"] = {**record.get("config", {}), "model": to_json(checkpoint.config)}
    files.write_json(folder / RECORD, {"record": record, "step": checkpoint.step})


def read_record(folder: epath.Path) -> tuple[dict[str, Any], int]:
    """What `write_record` wrote of the training, and its step.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return dict(NO_RECORD), 0
    found = files.read_json(path)
    match found:
        case {"record": {"config": {"model": dict()}, **_rest}, "step": int()}:
            return {**NO_RECORD, **current_record(found["record"])}, found["step"]
    raise UserError(f"{path}: expected record, with its config.model, and step; remove it to do without")
