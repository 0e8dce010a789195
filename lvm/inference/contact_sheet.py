"""Contact sheets: rows of labeled images, with answers framed."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

Pixels = UInt8[np.ndarray, "_ _ 3"]
_GAP, _LABEL = 4, 15  # pixels between images, and height of the label above each
_BACKGROUND, _TEXT, _FRAME = (255, 255, 255), (70, 70, 70), (214, 72, 40)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One labeled image of a sheet; answers are framed."""

    image: Pixels
    label: str = ""
    is_answer: bool = False


def render_sheet(rows: Sequence[Sequence[Cell | None]], side: int = 96) -> Pixels:
    """Renders rows of cells; images are scaled to `side` × `side` pixels, None leaves a gap."""
    columns = max(len(row) for row in rows)
    size = (columns * (side + _GAP) + _GAP, len(rows) * (side + _GAP + _LABEL) + _GAP)
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(11)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            if cell is None:
                continue
            left, top = _GAP + j * (side + _GAP), _GAP + i * (side + _GAP + _LABEL)
            draw.text((left, top), cell.label, _FRAME if cell.is_answer else _TEXT, font)
            image = Image.fromarray(cell.image)
            if image.size != (side, side):
                filters = Image.Resampling
                image = image.resize((side, side), filters.LANCZOS if side % image.width else filters.NEAREST)
            canvas.paste(image, (left, top + _LABEL))
            if cell.is_answer:
                box = (left - 2, top + _LABEL - 2, left + side + 1, top + _LABEL + side + 1)
                draw.rectangle(box, outline=_FRAME, width=2)
    return np.asarray(canvas)


def crop_rows(sheets: Sequence[Pixels], rows: int = 2, side: int = 96) -> Pixels:
    """Stacks the first rows of several sheets."""
    height = rows * (side + _GAP + _LABEL) + _GAP
    width = max(sheet.shape[1] for sheet in sheets)
    padding = [((0, 0), (0, width - sheet.shape[1]), (0, 0)) for sheet in sheets]
    cropped = [np.pad(s[:height], pad, constant_values=255) for s, pad in zip(sheets, padding, strict=True)]
    return np.concatenate(cropped)


def answer_row(gap: int, images: Iterable[Pixels]) -> list[Cell | None]:
    """Framed answers after `gap` empty cells."""
    return [*[None] * gap, *(Cell(image, "answer", True) for image in images)]


def completion_sheet(
    codes: Integer[np.ndarray, "G N"],
    answer: Callable[[np.ndarray, int], np.ndarray],
    decode: Callable[[np.ndarray], np.ndarray],
    prompt_fraction: float = 0.5,
) -> Pixels:
    """Renders a sentence, and below it the model's completion of its first part, the prompt.

    `answer` is (prompt int [k, N], number of images A) → int [A, N], `decode` int [B, N] → uint8 [B, R, R, 3].
    """
    prompt = max(1, round(prompt_fraction * len(codes)))
    rows: list[Sequence[Cell | None]] = [[Cell(x, f"{i + 1}") for i, x in enumerate(decode(codes))]]
    if prompt == len(codes):
        return render_sheet(rows)
    return render_sheet([*rows, answer_row(prompt, decode(answer(codes[:prompt], len(codes) - prompt)))])
