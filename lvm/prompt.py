"""Asks a model in images.

python -m lvm.prompt --model=W --tokenizer=W2 --sequence a.png b.png --out=answer.png
python -m lvm.prompt --model=W --tokenizer=W2 --pairs x1.png:y1.png x2.png:y2.png --query=q.png --out=answer.png
"""

from __future__ import annotations

import numpy as np
from absl import flags
from etils import epath

from lvm import cli, files
from lvm.console import say
from lvm.errors import UserError
from lvm.evaluation.pictures import Cell, sheet
from lvm.evaluation.report import png
from lvm.pretrained import LVM
from tokenizer import Tokenizer


def prompt_paths(sequence: list[str], pairs: list[str], query: str) -> list[tuple[str, str]]:
    """(label, path) of each image of the prompt, in order.

    Raises:
      UserError: no prompt, two kinds of prompt at once, pairs without a query, or a pair that isn't `x:y`.
    """
    if bool(sequence) == bool(pairs):
        raise UserError("give either --sequence a.png b.png …, or --pairs x.png:y.png … with --query=q.png")
    if sequence:
        if query:
            raise UserError("--query goes with --pairs, not with --sequence")
        return [(f"{number}", path) for number, path in enumerate(sequence, 1)]
    if not query:
        raise UserError("--pairs needs --query=IMAGE, the image to answer for")
    images = []
    for number, pair in enumerate(pairs, 1):
        x, colon, y = pair.partition(":")
        if not (x and colon and y):
            raise UserError(f"--pairs: {pair!r} is not of the form image.png:answer.png")
        images += [(f"x{number}", x), (f"y{number}", y)]
    return [*images, ("query", query)]


def main() -> None:
    """The command."""
    wanted = prompt_paths(_SEQUENCE.value or [], _PAIRS.value or [], _QUERY.value)
    tokenizer, model = Tokenizer.load(_TOKENIZER.value), LVM.load(_MODEL.value)
    if tokenizer.identity()["hash"] != model.record["tokenizer"]["hash"]:
        raise UserError(f"{_TOKENIZER.value}: not the tokenizer that {_MODEL.value} was trained with")
    images = np.stack([tokenizer.read(path) for _, path in wanted])  # [K, R, R, 3]
    grids = tokenizer.encode(images)  # [K, N]
    answers = model.generate(
        grids[None],
        _NUM_IMAGES.value,
        candidates=_CANDIDATES.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
    ).reshape(_CANDIDATES.value, _NUM_IMAGES.value, -1)
    prompt = [Cell(image, label) for (label, _), image in zip(wanted, images, strict=True)]
    rows: list[list[Cell | None]] = []
    for number, answer in enumerate(answers):
        written = [Cell(image, "answer", True) for image in tokenizer.decode(answer)]
        rows.append([*(prompt if number == 0 else [None] * len(prompt)), *written])
    out = epath.Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(out, png(sheet(rows, side=max(96, tokenizer.config.resolution))))
    say(f"{out}")


if __name__ == "__main__":
    _MODEL = flags.DEFINE_string("model", None, "a model's folder", required=True)
    _TOKENIZER = flags.DEFINE_string("tokenizer", None, "its tokenizer's folder", required=True)
    _SEQUENCE = flags.DEFINE_multi_string("sequence", [], "images to continue")
    _PAIRS = flags.DEFINE_multi_string("pairs", [], "examples, image.png:answer.png")
    _QUERY = flags.DEFINE_string("query", "", "the image to answer for, after --pairs")
    _OUT = flags.DEFINE_string("out", None, "the picture to write: the prompt and its answers", required=True)
    _NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "images to answer with", lower_bound=1)
    _CANDIDATES = flags.DEFINE_integer("candidates", 1, "answers to give", lower_bound=1)
    _TEMPERATURE = flags.DEFINE_float(
        "temperature", 0.0, "0 takes the most likely code each time", lower_bound=0
    )
    _TOP_K = flags.DEFINE_integer("top_k", 0, "draw among the k most likely codes; 0 is all", lower_bound=0)
    _TOP_P = flags.DEFINE_float("top_p", 1.0, "draw among codes of that much probability")
    _SEED = flags.DEFINE_integer("seed", 0, "of the drawing")
    cli.run(main, list_flags=("sequence", "pairs"))
