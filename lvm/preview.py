"""Render training rows as images and print statistics of the mixture.

    lvm preview --config=configs/demo_lvm.py --out=FOLDER

Renders the first rows of a step, one file each: every grid with its stream name, a bar in the color of its component,
and a black edge where a sentence begins. Grids without loss are pale, tokens that the row cuts off are gray. With a
tokenizer (`--config.tokenizer=…`) grids are decoded; without one every code is a color. Also prints what the whole run
reads: tokens by component, how full rows are, and how often components repeat.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lvm.common import cli
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.mixture.counter_rng import splitmix64
from lvm.data.mixture.packing import Spans
from lvm.data.mixture.rows import Rows
from lvm.data.streams.codecs import PALETTE
from lvm.training.config import TrainConfig, make_rows
from tokenizer import Tokenizer

_SIDE, _GAP, _LABEL, _BAR, _A_LINE = 96, 6, 14, 4, 8  # pixels, and cells a line
_CUT_OFF = 200  # grey

Decode = Callable[[np.ndarray], np.ndarray]  # codes int [B, N] → images uint8 [B, H, W, 3]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One grid of a row: image uint8 [H, W, 3], the name of its stream, its component, whether a sentence begins."""

    image: np.ndarray
    stream: str
    component: int
    starts_sentence: bool


def row_cells(rows: Rows, step: int, place: int, decode: Decode) -> list[Cell]:
    """The grids of the row at `place` of a step's batch."""
    batch = rows.batch(step, np.array([place]))
    learned = np.append(False, batch["loss_mask"][0])  # [C + 1], by token
    spans = rows.spans(step * rows.batch_spec["tokens"].shape[0] + place)
    ends = np.cumsum(spans.lengths)
    cells: list[Cell] = []
    for i in np.flatnonzero(spans.component_ids >= 0):
        mine = learned[ends[i] - spans.lengths[i] : ends[i]]
        cells += _sentence_cells(rows, spans, int(i), mine, decode)
    return cells


def _sentence_cells(rows: Rows, spans: Spans, i: int, learned: np.ndarray, decode: Decode) -> Iterator[Cell]:
    component = rows.mixture.components[spans.component_ids[i]]
    numbers = spans.sentence_ids[i : i + 1]
    codes, grids = component.sentences(numbers)[0].astype(np.int32), component.select_grids(numbers)[1]
    height, width = component.store.manifest["tokenizer"]["grid"]
    before = int(rows.vocabulary.bos is not None)
    state = np.zeros(before + codes.size + 1, np.uint8)  # by token: cut off 0, pale 1, learned 2
    first = int(spans.offsets[i])
    state[first : first + len(learned)] = 1 + learned[: len(state) - first]
    states = state[before : before + codes.size].reshape(len(codes), height, width)
    images = decode(codes)
    for g, (image, shown) in enumerate(zip(images, states, strict=True)):
        if shown.any():
            side = image.shape[0] // height, image.shape[1] // width
            pixels = shown.repeat(side[0], 0).repeat(side[1], 1)[..., None]  # [H, W, 1]
            pale = (image // 4 + 191).astype(np.uint8)
            drawn = np.where(pixels == 2, image, np.where(pixels == 1, pale, np.uint8(_CUT_OFF)))
            stream = component.recipe.streams[grids.streams[0, g]]
            yield Cell(drawn, stream, int(spans.component_ids[i]), starts_sentence=g == 0)


def render_row(cells: list[Cell], names: list[str], title: str) -> np.ndarray:
    """Cells as one picture, uint8 [H, W, 3], with a legend of the components."""
    across, down = _SIDE + _GAP, _SIDE + _GAP + _LABEL + _BAR
    lines = max(1, -(-len(cells) // _A_LINE))
    paper = Image.new("RGB", (_A_LINE * across + _GAP, lines * down + 2 * _LABEL), "white")
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(11)
    legend = "   ".join(dict.fromkeys(names[cell.component] for cell in cells))
    draw.text((_GAP, 2), f"{title}: {legend}", "black", font)
    for place, cell in enumerate(cells):
        left = _GAP + place % _A_LINE * across
        top = 2 * _LABEL + place // _A_LINE * down
        label = f"{names[cell.component]}: {cell.stream}" if cell.starts_sentence else cell.stream
        draw.text((left, top - _LABEL + _BAR), label[:17], "black", font)
        colour = tuple(PALETTE[cell.component % 254 + 2].tolist())
        draw.rectangle((left, top + _BAR, left + _SIDE - 1, top + 2 * _BAR - 1), colour)
        image = Image.fromarray(cell.image).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
        paper.paste(image, (left, top + 2 * _BAR))
        if cell.starts_sentence:
            draw.rectangle((left - 4, top + _BAR, left - 2, top + 2 * _BAR + _SIDE - 1), "black")
    return np.asarray(paper)


def code_colors(grid: tuple[int, int]) -> Decode:
    """Draws codes as colours: equal codes, equal colours."""

    def decode(codes: np.ndarray) -> np.ndarray:
        channels = splitmix64(
            codes.astype(np.uint64)[..., None] + np.arange(3, dtype=np.uint64) * np.uint64(2**32)
        )
        return (channels % np.uint64(256)).astype(np.uint8).reshape(len(codes), *grid, 3)

    return decode


def report(rows: Rows, steps: int, batches: int) -> list[str]:
    """Lines: what `steps` steps read, and how full the rows of the first `batches` are."""
    lines = rows.summary()
    names = [component.name for component in rows.mixture.components]
    counts, filled, learned, total = np.zeros(len(names), np.int64), 0, 0, 0
    for step in range(batches):
        batch = rows.batch(step)
        ids = batch["component_ids"]
        counts += np.bincount(ids[ids >= 0], minlength=len(names))
        filled, total = filled + int(np.count_nonzero(ids >= 0)), total + ids.size
        learned += int(np.count_nonzero(batch["loss_mask"]))
    shares = ", ".join(
        f"{name} {count:,} ({count / max(1, filled):.1%})" for name, count in zip(names, counts, strict=True)
    )
    lines.append(f"tokens of the first {batches} batches by component: {shares}")
    lines.append(f"rows are {filled / total:.2%} full; {learned / total:.2%} of their targets bear loss")
    for component, count in zip(rows.mixture.components, rows.sentences_read(steps), strict=True):
        lines.append(
            f"{component.name} after {steps} steps: {count:,} sentences, "
            f"{count / component.sentences_per_epoch:.3g} epochs, "
            f"an original {component.repetitions(count):.3g} times"
        )
    return lines


def _run(args: cli.Args) -> None:
    config = from_config_dict(TrainConfig, args.config)
    if not (0 < args.rows <= config.batch_size and args.batches > 0 and args.step >= 0):
        raise UserError(
            f"--rows: {args.rows} of 1..{config.batch_size} (config.batch_size), --batches: {args.batches} "
            f"from 1 on, --step: {args.step} from 0 on"
        )
    rows = make_rows(config)
    tokens = config.batch_size * config.model.context
    for line in report(rows, config.loop.with_total_steps(tokens).total_steps, args.batches):
        print(line)
    header = rows.mixture.stores[0].manifest["tokenizer"]
    if config.tokenizer:
        tokenizer = Tokenizer.load(config.tokenizer)
        if header["hash"] and tokenizer.identity()["hash"] != header["hash"]:
            raise UserError(f"config.tokenizer: {config.tokenizer} is not what made the store's codes")
        decode: Decode = tokenizer.decode
    else:
        log_info("no config.tokenizer: every code is drawn as a colour")
        decode = code_colors(tuple(header["grid"]))
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    names = [component.name for component in rows.mixture.components]
    for place in range(args.rows):
        cells = row_cells(rows, args.step, place, decode)
        picture = render_row(cells, names, f"step {args.step}, row {place}")
        Image.fromarray(picture).save(folder / f"step-{args.step:07d}-row-{place:04d}.png")
    log_info(f"{args.rows} rows drawn in {folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string("out", None, "folder for the pictures", required=True)
    flags.integer("rows", 2, "rows to draw")
    flags.integer("step", 0, "of which step")
    flags.integer("batches", 20, "batches that are counted")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
