"""What stands beside exported weights for their users: a model card, and an example in torch."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from lvm.common.config import to_json
from lvm.data.images.preprocess import Preprocess
from lvm.interop.lazy_checkpoint import LazyCheckpoint

README, EXAMPLE = "README.md", "example.py"
TOKENIZER = "tokenizer"  # the folder of the export that holds it


def example_script(preprocess: Preprocess) -> str:
    """The text of `example.py`, which prepares pictures as the tokenizer wants them."""
    plain = dataclasses.replace(preprocess, resizer="pillow", decode="full")  # as the example reads pictures
    crop = "left, top, left + side, top + side" if preprocess.mode == "center_crop" else "0, 0, *picture.size"
    return _EXAMPLE.read_text().format(
        side=preprocess.resolution,
        box=crop,
        crop=_CROP if preprocess.mode == "center_crop" else "",
        filter=preprocess.filter.upper(),
        note=""
        if preprocess == plain
        else f"    # The tokenizer saw pictures by {_said(preprocess)}: a level or two away.\n",
    )


def _said(preprocess: Preprocess) -> str:
    return f"resizer {preprocess.resizer!r} and decode {preprocess.decode!r}"


_CROP = """    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
"""
_EXAMPLE = pathlib.Path(__file__).with_name("example.py.in")


def model_card(checkpoint: LazyCheckpoint, identity: Mapping[str, Any] | None, has_tokenizer: bool) -> str:
    """The model card.

    Args:
      stored: the model.
      identity: of its tokenizer (`Tokenizer.identity`), where it is known.
      has_tokenizer: whether the tokenizer is beside the weights.
    """
    parts = [
        _HEAD,
        _sizes(checkpoint),
        _tokenizer(identity, has_tokenizer),
        _prompting(checkpoint, has_tokenizer),
    ]
    parts.append(_training(checkpoint))
    return "\n".join(parts)


_HEAD = """---
library_name: transformers
tags: [lvm, vision, in-context]
---
# A large vision model

A decoder over the codes of images (Bai et al., [arXiv 2312.00785](https://arxiv.org/abs/2312.00785)): transformers'
`LlamaForCausalLM`, with image codes for a vocabulary and no text. It continues a sequence of images, or answers a
query as example pairs before it do.
"""


def _sizes(checkpoint: LazyCheckpoint) -> str:
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    count = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    specials = {name: getattr(vocabulary, name) for name in ("bos", "eos", "pad")}
    rows = {
        "parameters": f"{count:,}",
        "layers, width, MLP": f"{config.num_layers}, {config.hidden_size}, {config.mlp_size}",
        "heads, key-value heads": f"{config.num_heads}, {config.kv_heads}",
        "context": f"{config.context} tokens",
        "output projection": "the embedding" if config.tie_embeddings else "its own",
        "stored in": checkpoint.dtype,
        "vocabulary": f"{vocabulary.size} ids: codes 0–{vocabulary.num_codes - 1}, "
        + ", ".join(
            f"{name.upper()} {'none' if token is None else token}" for name, token in specials.items()
        ),
        "training step": f"{checkpoint.step:,}" if checkpoint.step else "not told",
    }
    return "## Sizes\n\n| | |\n|---|---|\n" + "".join(
        f"| {name} | {value} |\n" for name, value in rows.items()
    )


def _tokenizer(identity: Mapping[str, Any] | None, has_tokenizer: bool) -> str:
    where = f" It is in `{TOKENIZER}/`, as diffusers' `VQModel`." if has_tokenizer else ""
    if identity is None:
        return "## Tokenizer\n\nNot told: codes mean nothing without the tokenizer that made them.\n"
    rows, columns = identity["grid"]
    preprocess = identity["preprocess"]
    return (
        f"## Tokenizer\n\n{identity['num_codes']} codes, {rows} × {columns} an image in raster order; pictures become "
        f"{preprocess['resolution']} × {preprocess['resolution']} pixels by `{preprocess['mode']}` "
        f"({preprocess['filter']}), colours {preprocess['colours']}.{where}\n\n- weights: `{identity['weights']}`\n"
        f"- with network and preprocessing: `{identity['hash']}`\n"
    )


def _prompting(checkpoint: LazyCheckpoint, has_tokenizer: bool) -> str:
    vocabulary = checkpoint.vocabulary
    first = "the" if vocabulary.bos is None else f"{vocabulary.bos} (BOS), then the"
    run = (
        "\n```sh\npython example.py x1.png y1.png x2.png y2.png query.png answer.png\n```\n"
        if has_tokenizer
        else ""
    )
    return (
        f"## Prompting\n\nA prompt is {first} codes of each image, one image after the other. To continue a sequence "
        "give its images; to have a task done give pairs of image and answer, then the image to answer for. The next "
        f"image is as many new tokens as an image has codes. `generation_config.json` suppresses the ids from "
        f"{vocabulary.num_codes} on, which are no codes. vLLM reads this folder with `skip_tokenizer_init=True`, is "
        f"asked by `prompt_token_ids`, and needs `allowed_token_ids=list(range({vocabulary.num_codes}))` among its "
        f"sampling parameters.\n{run}"
    )


def _training(checkpoint: LazyCheckpoint) -> str:
    config = checkpoint.record.get("config", {})
    told = {name: value for name, value in config.items() if name != "model"}
    if not told:
        return "## Training\n\nNot told.\n"
    whole = json.dumps({**told, "model": to_json(checkpoint.config)}, indent=1, sort_keys=True)
    return f"## Training\n\nThe configuration it was trained with:\n\n```json\n{whole}\n```\n"
