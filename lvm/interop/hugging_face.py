"""Folders of transformers' `LlamaForCausalLM`: config.json, generation_config.json, weights in one file or shards."""

import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.interop.config_fields import LLAMA_CONTEXT, common_fields, read_checkpoint, special_token_fields, write_record
from lvm.interop.layouts import HUGGING_FACE
from lvm.interop.lazy_checkpoint import GENERATION_CONFIG, LazyCheckpoint, special_ids
from lvm.interop.tensors import LazyTensor, format_names, read_safetensors, unwrap, write_safetensors
from lvm.interop.torch_reader import read_state_dict
from lvm.model.transformer import ModelConfig
from lvm.model.vocabulary import Vocabulary
from lvm.training.workdir import CONFIG

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
# A buffer that old versions saved with the parameters.
_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def has_weights(names: Sequence[str]) -> bool:
    """Returns True if weights of transformers are among the file names."""
    return any(_WEIGHTS.fullmatch(name) for name in names)


def read(folder: epath.Path) -> LazyCheckpoint:
    """Opens the checkpoint in a folder of transformers' Llama.

    Raises UserError for an unsupported network, a missing shard, tensors that are not the network's, or an unknown
    vocabulary.
    """

    def open_tensors(config: ModelConfig) -> dict[str, LazyTensor]:
        opened = unwrap(_open_weights(folder), HUGGING_FACE.name("embedding"), folder)
        tensors = {name: t for name, t in opened.items() if not _BUFFERS.fullmatch(name)}
        if config.tie_embeddings:  # some versions save the embedding twice
            tensors.pop(HUGGING_FACE.name("head"), None)
        return tensors

    fields = files.read_json(folder / CONFIG)
    return read_checkpoint(folder, folder, fields, LLAMA_CONTEXT, HUGGING_FACE, open_tensors)


def _open_weights(folder: epath.Path) -> dict[str, LazyTensor]:
    for name, open_file in ((SAFETENSORS, read_safetensors), (TORCH, read_state_dict)):
        if (folder / name).exists():
            return open_file(folder / name)
        if (folder / f"{name}{INDEX}").exists():
            return _open_shards(folder / f"{name}{INDEX}", open_file)
    raise UserError(f"{folder}: shards of weights without their index, {SAFETENSORS}{INDEX} or {TORCH}{INDEX}")


def _open_shards(index: epath.Path, open_file: Callable[[epath.Path], dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    content = files.read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: no weight_map; expected an object of tensor names and their files")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if pathlib.PurePath(name).name != name]
    missing = [name for name in names if not (index.parent / name).is_file()]
    if outside or missing:
        raise UserError(f"{index}: files not found in its folder: {format_names(outside or missing)}")
    shards = {name: open_file(index.parent / name) for name in names}
    absent = [f"{tensor} in {name}" for tensor, name in weight_map.items() if tensor not in shards[name]]
    if absent:
        raise UserError(f"{index}: tensors not found in their files: {format_names(absent)}")
    return {tensor: shards[name][tensor] for tensor, name in weight_map.items()}


def write(folder: pathlib.Path, checkpoint: LazyCheckpoint, max_shard_bytes: int) -> None:
    """Writes config.json, generation_config.json, and weights in shards of at most `max_shard_bytes`."""
    tensors = HUGGING_FACE.export_tensors(checkpoint.tensors)
    shards = list(_shards(tensors, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SAFETENSORS
        write_safetensors(folder / file, {name: tensors[name].read() for name in names})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        files.write_json(folder / f"{SAFETENSORS}{INDEX}", index)
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    fields = {
        **common_fields(config, vocabulary, LLAMA_CONTEXT),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        # transformers 4 reads rope_theta, rope_scaling and torch_dtype; 5 reads rope_parameters and dtype.
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "torch_dtype": checkpoint.dtype,
        "dtype": checkpoint.dtype,
    }
    files.write_json(folder / CONFIG, fields)
    # Only codes are images: no other id may be generated.
    suppressed = list(range(vocabulary.num_codes, vocabulary.size))
    generation = {**special_token_fields(vocabulary), "suppress_tokens": suppressed}
    files.write_json(folder / GENERATION_CONFIG, generation)
    _write_tokenizer(folder, vocabulary, config.context)
    write_record(folder, checkpoint)


def _write_tokenizer(folder: pathlib.Path, vocabulary: Vocabulary, context: int) -> None:
    """Writes a tokenizer of text, for programs that want one: codes in decimal, separated by spaces.

    Any other word is an error. BOS, if the vocabulary has one, is put in front, as our prompts have it.
    """
    specials = {f"<{name}>": token for name, token in special_ids(vocabulary).items() if token is not None}
    names = {token: name for name, token in specials.items()}
    words = [str(i) if i < vocabulary.num_codes else names.get(i, f"<{i}>") for i in range(vocabulary.size)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    bos = [{"SpecialToken": {"id": name, "type_id": 0}} for name in specials if name == "<bos>"]
    template = {
        "type": "TemplateProcessing",
        "single": [*bos, sequences[0]],
        "pair": [*bos, *sequences],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [vocabulary.bos], "tokens": ["<bos>"]}} if bos else {},
    }
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": name, **flags} for name, token in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": template,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    files.write_json(folder / "tokenizer.json", content)
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # transformers would make another of `model_type`
        "model_input_names": ["input_ids", "attention_mask"],  # Llama takes no `token_type_ids`
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **{f"{name.strip('<>')}_token": name for name in specials},
    }
    files.write_json(folder / "tokenizer_config.json", fields)


def _shards(tensors: Mapping[str, LazyTensor], max_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names
