"""Files for users of exported weights: a model card, and an example script in torch."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from lvm.common.config import to_json
from lvm.data.images.preprocess import Preprocess
from lvm.interop.lazy_checkpoint import LazyCheckpoint, special_ids

README, EXAMPLE = "README.md", "example.py"
TOKENIZER = "tokenizer"  # folder in the export
_HEAD_DIM_MULTIPLE = 8  # of flash attention (github.com/vllm-project/vllm/issues/336, NVIDIA/TensorRT-LLM/issues/679)
_EXAMPLE = pathlib.Path(__file__).with_name("example.py.in")
_CROP = """    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
"""
_INTRODUCTION = """---
library_name: transformers
tags: [lvm, vision, in-context]
---
# A large vision model

A decoder over image codes (Bai et al., [arXiv 2312.00785](https://arxiv.org/abs/2312.00785)): transformers'
`LlamaForCausalLM` with image codes as its vocabulary and no text. It continues a sequence of images, or performs on a
query image the task that pairs of example images show.
"""


def example_script(preprocess: Preprocess) -> str:
    """The text of `example.py`, with the tokenizer's preprocessing."""
    is_cropped = preprocess.mode == "center_crop"
    note = ""
    if preprocess.icc == "srgb":
        note = "    # The tokenizer's images with an ICC profile were converted to sRGB (ImageCms.profileToProfile).\n"
    if preprocess != dataclasses.replace(preprocess, resizer="pillow", decode="full"):
        note += (
            f"    # The tokenizer was trained with resizer {preprocess.resizer!r} and decode {preprocess.decode!r}; "
            "Pillow's pixels differ by a level or two.\n"
        )
    return _EXAMPLE.read_text("utf-8").format(
        side=preprocess.resolution,
        box="left, top, left + side, top + side" if is_cropped else "0, 0, *picture.size",
        crop=_CROP if is_cropped else "",
        filter=preprocess.filter.upper(),
        note=note,
    )


def model_card(checkpoint: LazyCheckpoint, identity: Mapping[str, Any] | None, has_tokenizer: bool) -> str:
    """The text of the model card; `identity` is the `Tokenizer.identity()` of its tokenizer, None if unknown."""
    usage = [_tokenizer(identity, has_tokenizer), _prompting(checkpoint, has_tokenizer)]
    return "\n".join([_INTRODUCTION, _sizes(checkpoint), *usage, _training(checkpoint)])


def _sizes(checkpoint: LazyCheckpoint) -> str:
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    count = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    specials = ", ".join(
        f"{name.upper()} {'none' if token is None else token}" for name, token in special_ids(vocabulary).items()
    )
    rows = {
        "parameters": f"{count:,}",
        "layers, hidden size, MLP size": f"{config.num_layers}, {config.hidden_size}, {config.mlp_size}",
        "heads, key-value heads, head dim": f"{config.num_heads}, {config.kv_heads}, {config.head_dim}",
        "context": f"{config.context} tokens",
        "output projection": "tied to the embedding" if config.tie_embeddings else "untied",
        "dtype": checkpoint.dtype,
        "vocabulary": f"{vocabulary.size} ids: codes 0–{vocabulary.num_codes - 1}, {specials}",
        "training step": f"{checkpoint.step:,}" if checkpoint.step else "unknown",
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    note = ""
    if config.head_dim % _HEAD_DIM_MULTIPLE:
        note = (
            f"\nFlash attention of vLLM and TensorRT-LLM takes head dims that are multiples of {_HEAD_DIM_MULTIPLE}, "
            f"and refuses {config.head_dim}.\n"
        )
    return f"## Sizes\n\n| | |\n|---|---|\n{table}{note}"


def _tokenizer(identity: Mapping[str, Any] | None, has_tokenizer: bool) -> str:
    if identity is None:
        return "## Tokenizer\n\nUnknown. Codes can only be decoded by the tokenizer that encoded them.\n"
    height, width = identity["grid"]
    preprocess = identity["preprocess"]
    colors = ", ICC profiles converted to sRGB" if preprocess.get("icc") == "srgb" else ""
    location = f" `{TOKENIZER}/` holds it as diffusers' `VQModel`." if has_tokenizer else ""
    return (
        f"## Tokenizer\n\n{identity['num_codes']} codes, {height} × {width} an image in raster order; images are "
        f"resized to {preprocess['resolution']} × {preprocess['resolution']} pixels by `{preprocess['mode']}` "
        f"({preprocess['filter']}){colors}; "
        f"the network's input is uint8 / 255, with mean 0 and deviation 1.{location}\n\n"
        f"- hash of the weights: `{identity['weights']}`\n"
        f"- hash with network and preprocessing: `{identity['hash']}`\n"
    )


def _prompting(checkpoint: LazyCheckpoint, has_tokenizer: bool) -> str:
    vocabulary = checkpoint.vocabulary
    first = "the" if vocabulary.bos is None else f"{vocabulary.bos} (BOS), then the"
    command = "python example.py x1.png y1.png x2.png y2.png query.png answer.png"
    return (
        f"## Prompting\n\nA prompt is {first} codes of each image, one image after the other. To continue a sequence, "
        "give its images; for a task, give pairs of input and answer, then the query image. The next image is as "
        "many new tokens as an image has codes. `generate` is greedy; to sample, give `do_sample=True, top_k=0`: "
        "without `top_k`, transformers samples from the 50 most likely ids. `generation_config.json` suppresses ids "
        f"from {vocabulary.num_codes} on, which are not codes. For programs that want text, `tokenizer.json` reads and "
        "writes codes in decimal, separated by spaces. vLLM loads this folder with `skip_tokenizer_init=True`, "
        "takes `prompt_token_ids`, and needs the sampling parameter "
        f"`allowed_token_ids=list(range({vocabulary.num_codes}))`.\n"
        + (f"\n```sh\n{command}\n```\n" if has_tokenizer else "")
    )


def _training(checkpoint: LazyCheckpoint) -> str:
    config = checkpoint.record.get("config", {})
    if not config.keys() - {"model"}:
        return "## Training\n\nUnknown.\n"
    text = json.dumps({**config, "model": to_json(checkpoint.config)}, indent=1, sort_keys=True)
    return f"## Training\n\nTraining configuration:\n\n```json\n{text}\n```\n"
