"""The config.json of transformers' and EasyLM's Llama folders, and our `lvm.json` beside it.

Every field that changes the network is read; a value that would need another network is an error.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from lvm.common import files
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.interop.layouts import Layout
from lvm.interop.lazy_checkpoint import NO_RECORD, LazyCheckpoint, check_dtypes, load_vocabulary, special_ids
from lvm.interop.tensors import Tensors, check_shapes
from lvm.model.transformer import ModelConfig
from lvm.model.vocabulary import Vocabulary
from lvm.training.workdir import CONFIG, current_record

RECORD = "lvm.json"  # the run record, beside weights in another format

# The field of the context length.
LLAMA_CONTEXT = "max_position_embeddings"
EASYLM_CONTEXT = "max_sequence_length"
_FIELDS = {
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
# Optional fields, with the defaults of transformers' and EasyLM's classes.
_DEFAULTS = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False, "rope_theta": 1e4}
# Supported values of transformers' other fields; the first is the default.
_SUPPORTED = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}


def common_fields(config: ModelConfig, vocabulary: Vocabulary, context_field: str) -> dict[str, Any]:
    """The fields of config.json that transformers and EasyLM share."""
    return {
        **{field: getattr(config, ours) for field, ours in _FIELDS.items()},
        "num_key_value_heads": config.kv_heads,
        context_field: config.context,
        "rope_theta": config.rope_theta,
        **special_token_fields(vocabulary),
    }


def special_token_fields(vocabulary: Vocabulary) -> dict[str, int | None]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`."""
    return {f"{name}_token_id": token for name, token in special_ids(vocabulary).items()}


def read_checkpoint(
    folder: epath.Path,
    path: epath.Path,
    fields: Mapping[str, Any],
    context_field: str,
    layout: Layout,
    open_tensors: Callable[[ModelConfig], Tensors],
) -> LazyCheckpoint:
    """Opens a checkpoint in another format.

    Args:
      folder: contains config.json with these `fields`, of which `context_field` is the context length.
      path: of the weights, for messages.
      layout: of the tensors that `open_tensors` returns.

    Raises:
      UserError: an unsupported network, tensors that are not the network's, or an unknown vocabulary.
    """
    record, step = read_record(folder)
    config = parse_config(fields, context_field, record, folder / CONFIG)
    vocabulary = load_vocabulary(folder, config.vocabulary_size)
    external = open_tensors(config)
    check_shapes(external, layout.shapes(config), path)
    check_dtypes(external, path)
    checkpoint = LazyCheckpoint(
        config, vocabulary, layout.import_tensors(external, config), record, step, os.fspath(path)
    )
    if "model" in record.get("config", {}):
        return checkpoint
    # Nothing tells the compute dtype: that of the weights, or float32 for float16, which isn't one of ours.
    dtype = "bfloat16" if checkpoint.dtype == "bfloat16" else "float32"
    return dataclasses.replace(checkpoint, config=dataclasses.replace(config, dtype=dtype))


def parse_config(
    fields: Mapping[str, Any], context_field: str, record: Mapping[str, Any], path: epath.Path
) -> ModelConfig:
    """The model of a config.json; settings that it lacks are the run record's, or defaults.

    Raises UserError if a size is missing or impossible, or a field asks for an unsupported network.
    """
    for name, supported in _SUPPORTED.items():
        if name in fields and fields[name] not in supported:
            raise UserError(f"{path}: {name}: {fields[name]!r} is not supported; expected {supported[0]!r}")
    values: dict[str, Any] = {"rope_theta": _rope_theta(fields, path)}
    for field, ours in {**_FIELDS, context_field: "context"}.items():
        if field == "num_key_value_heads":
            heads = fields.get(field)
            values[ours] = 0 if heads in (None, fields.get("num_attention_heads")) else heads
        elif field in fields or field in _DEFAULTS:
            values[ours] = fields.get(field, _DEFAULTS.get(field))
        else:
            raise UserError(f"{path}: {field} is missing; add the checkpoint's value")
    trained = record.get("config", {}).get("model", {})
    if trained.get("num_kv_heads") == trained.get("num_heads") and values["num_kv_heads"] == 0:
        values["num_kv_heads"] = trained.get("num_kv_heads", 0)  # 0 and num_heads mean the same
    config: ModelConfig = from_config_dict(ModelConfig, trained | values, f"{path}")
    if fields.get("head_dim") not in (None, config.head_dim):
        raise UserError(
            f"{path}: head_dim: {fields['head_dim']} is not supported; expected hidden_size / heads, {config.head_dim}"
        )
    if config.vocabulary_size < 1:
        raise UserError(f"{path}: vocab_size: {config.vocabulary_size} must be positive")
    return config


def _rope_theta(fields: Mapping[str, Any], path: epath.Path) -> float:
    """The RoPE base, a member of `rope_parameters` in transformers 5 and a field of its own in 4."""
    values: dict[str, Any] = {"rope_theta": fields.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name) or {}
        if not isinstance(rope, dict) or any(rope.get(key, "default") != "default" for key in ("rope_type", "type")):
            raise UserError(f"{path}: {name}: {rope!r} is not supported; expected rope_type 'default'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"{path}: {name}: {rope!r} is not supported; expected partial_rotary_factor 1")
        values[f"{name}.rope_theta"] = rope.get("rope_theta")
    values = {name: value for name, value in values.items() if value is not None}
    if len(set(values.values())) > 1:
        raise UserError(f"{path}: {', but '.join(f'{name}: {value!r}' for name, value in values.items())}")
    return next(iter(values.values()), _DEFAULTS["rope_theta"])


def write_record(folder: pathlib.Path, checkpoint: LazyCheckpoint) -> None:
    """Writes `vocabulary.json` and `lvm.json`."""
    checkpoint.vocabulary.save(folder)
    files.write_json(folder / RECORD, {"record": checkpoint.export_record(), "step": checkpoint.step})


def read_record(folder: epath.Path) -> tuple[dict[str, Any], int]:
    """The run record and step in `lvm.json`, or `NO_RECORD` and 0. Raises UserError if the file is damaged."""
    path = folder / RECORD
    if not path.exists():
        return dict(NO_RECORD), 0
    content = files.read_json(path)
    match content:
        case {"record": {"config": {"model": dict()}, **_rest}, "step": int()}:
            return {**NO_RECORD, **current_record(content["record"])}, content["step"]
    raise UserError(f"{path}: expected record, with its config.model, and step; or remove the file")
