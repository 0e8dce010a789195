"""Render training rows as images and print statistics of the mixture.

    lvm preview --config=configs/demo_lvm.py --out=FOLDER

Renders the first rows of a step, one file each: every grid with its stream name, a bar in the color of its component,
and a black edge where a sentence begins. Grids without loss are pale, tokens that the row cuts off are gray. With a
tokenizer (`--config.tokenizer=…`) grids are decoded; without one every code is a color. Also prints what the whole run
reads: tokens by component, how full rows are, and how often components repeat.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from lvm.common import cli
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.mixture.counter_rng import splitmix64
from lvm.data.mixture.packing import Spans
from lvm.data.mixture.rows import Rows
from lvm.data.store.manifest import same_codes
from lvm.data.streams.codecs import PALETTE
from lvm.training.config import TrainConfig, make_rows
from tokenizer import Tokenizer

_SIDE, _GAP, _LABEL, _BAR, _PER_LINE = 96, 6, 14, 4, 8  # pixels, and cells in a line
_CUT_OFF = 200  # gray level

Decode = Callable[[np.ndarray], np.ndarray]  # codes int [B, N] → images uint8 [B, H, W, 3]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One grid of a row, with its stream and component, and whether it begins a sentence."""

    image: UInt8[np.ndarray, "H W 3"]
    stream: str
    component: int
    starts_sentence: bool


def row_cells(rows: Rows, step: int, row: int, decode: Decode) -> list[Cell]:
    """The grids of one row of a step's batch."""
    batch = rows.batch(step, np.array([row]))
    loss_mask = np.append(False, batch["loss_mask"][0])  # [C + 1], by token
    spans = rows.packer.spans(step * rows.batch_spec["tokens"].shape[0] + row, 1)
    ends = np.cumsum(spans.lengths)
    cells: list[Cell] = []
    for i in np.flatnonzero(spans.component_ids >= 0):
        mask = loss_mask[ends[i] - spans.lengths[i] : ends[i]]
        cells += _sentence_cells(rows, spans[i : i + 1], mask, decode)
    return cells


def _sentence_cells(rows: Rows, span: Spans, loss_mask: np.ndarray, decode: Decode) -> Iterator[Cell]:
    component_id, offset = int(span.component_ids[0]), int(span.offsets[0])
    component = rows.mixture.components[component_id]
    codes = component.sentences(span.sentence_ids)[0].astype(np.int32)
    _, grids = component.select_grids(span.sentence_ids)
    height, width = component.store.manifest["tokenizer"]["grid"]
    num_bos = int(rows.vocabulary.bos is not None)
    state = np.zeros(num_bos + codes.size + 1, np.uint8)  # by token: 0 cut off, 1 without loss, 2 with loss
    state[offset : offset + len(loss_mask)] = 1 + loss_mask[: len(state) - offset]
    states = state[num_bos : num_bos + codes.size].reshape(len(codes), height, width)
    for g, (image, grid) in enumerate(zip(decode(codes), states, strict=True)):
        if grid.any():
            scale = image.shape[0] // height, image.shape[1] // width
            pixels = grid.repeat(scale[0], 0).repeat(scale[1], 1)[..., None]  # [H, W, 1]
            pale = (image // 4 + 191).astype(np.uint8)
            shaded = np.where(pixels == 2, image, np.where(pixels == 1, pale, np.uint8(_CUT_OFF)))
            stream = component.recipe.streams[grids.streams[0, g]]
            yield Cell(shaded, stream, component_id, starts_sentence=g == 0)


def render_row(cells: list[Cell], names: list[str], title: str) -> UInt8[np.ndarray, "H W 3"]:
    """Renders the cells of a row as one image, with a legend of the components' `names`."""
    across, down = _SIDE + _GAP, _SIDE + _GAP + _LABEL + _BAR
    lines = max(1, -(-len(cells) // _PER_LINE))
    canvas = Image.new("RGB", (_PER_LINE * across + _GAP, lines * down + 2 * _LABEL), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    legend = "   ".join(dict.fromkeys(names[cell.component] for cell in cells))
    draw.text((_GAP, 2), f"{title}: {legend}", "black", font)
    for i, cell in enumerate(cells):
        left = _GAP + i % _PER_LINE * across
        top = 2 * _LABEL + i // _PER_LINE * down
        label = f"{names[cell.component]}: {cell.stream}" if cell.starts_sentence else cell.stream
        draw.text((left, top - _LABEL + _BAR), label[:17], "black", font)
        color = tuple(PALETTE[cell.component % 254 + 2].tolist())
        draw.rectangle((left, top + _BAR, left + _SIDE - 1, top + 2 * _BAR - 1), color)
        image = Image.fromarray(cell.image).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
        canvas.paste(image, (left, top + 2 * _BAR))
        if cell.starts_sentence:
            draw.rectangle((left - 4, top + _BAR, left - 2, top + 2 * _BAR + _SIDE - 1), "black")
    return np.asarray(canvas)


def code_colors(grid: tuple[int, int]) -> Decode:
    """A decoder that renders each code of a grid as a color of its own."""

    def decode(codes: np.ndarray) -> np.ndarray:
        channels = np.arange(3, dtype=np.uint64) * np.uint64(2**32)
        colors = splitmix64(codes.astype(np.uint64)[..., None] + channels) % np.uint64(256)
        return colors.astype(np.uint8).reshape(len(codes), *grid, 3)

    return decode


def report(rows: Rows, steps: int, batches: int) -> list[str]:
    """Lines about the data of `steps` steps, and about the fill of rows in the first `batches`."""
    components, lines = rows.mixture.components, rows.summary()
    counts, num_loss, total = np.zeros(len(components), np.int64), 0, 0
    for step in range(batches):
        batch = rows.batch(step)
        ids = batch["component_ids"]
        counts += np.bincount(ids[ids >= 0], minlength=len(components))
        total += ids.size
        num_loss += int(np.count_nonzero(batch["loss_mask"]))
    filled = int(counts.sum())
    shares = [f"{c.name} {n:,} ({n / max(1, filled):.1%})" for c, n in zip(components, counts, strict=True)]
    lines.append(f"tokens of the first {batches} batches by component: {', '.join(shares)}")
    lines.append(f"rows are {filled / total:.2%} full; {num_loss / total:.2%} of their targets bear loss")
    for component, count in zip(components, rows.sentences_read(steps), strict=True):
        lines.append(
            f"{component.name} after {steps} steps: {count:,} sentences, "
            f"{count / component.sentences_per_epoch:.3g} epochs, "
            f"an original {component.repetitions(count):.3g} times"
        )
    return lines


def _run(args: cli.Args) -> None:
    config = from_config_dict(TrainConfig, args.config)
    if not 0 < args.rows <= config.batch_size:
        raise UserError(f"--rows={args.rows} must be in [1, {config.batch_size}], config.batch_size")
    rows = make_rows(config)
    tokens = config.batch_size * config.model.context
    for line in report(rows, config.loop.with_total_steps(tokens).total_steps, args.batches):
        print(line)
    header = rows.mixture.tokenizer
    if config.tokenizer:
        tokenizer = Tokenizer.load(config.tokenizer)
        if header["hash"] and not same_codes(tokenizer.identity(), header):
            raise UserError(f"config.tokenizer={config.tokenizer} is not the tokenizer of the store's codes")
        decode: Decode = tokenizer.decode
    else:
        log_info("no config.tokenizer: codes are rendered as colors")
        decode = code_colors(tuple(header["grid"]))
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    names = [component.name for component in rows.mixture.components]
    for row in range(args.rows):
        cells = row_cells(rows, args.step, row, decode)
        image = render_row(cells, names, f"step {args.step}, row {row}")
        Image.fromarray(image).save(folder / f"step-{args.step:07d}-row-{row:04d}.png")
    log_info(f"{args.rows} rows rendered in {folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.config()
    flags.string("out", None, "folder for the images", required=True)
    flags.integer("rows", 2, "number of rows to render")
    flags.integer("step", 0, "step of the rows", lower_bound=0)
    flags.integer("batches", 20, "number of batches to count tokens of", lower_bound=1)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
