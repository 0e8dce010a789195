"""Contact sheets: rows of images with labels, the answers framed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP, _LABEL = 4, 15  # pixels between images, and for a label above each
_PAPER, _INK, _FRAME = (255, 255, 255), (70, 70, 70), (214, 72, 40)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One image of a sheet, uint8 [H, W, 3], with a label; an answer is framed."""

    image: np.ndarray
    label: str = ""
    is_answer: bool = False


def render_sheet(rows: Sequence[Sequence[Cell | None]], side: int = 96) -> np.ndarray:
    """Rows of labelled cells → uint8 [H, W, 3]; images are shown `side` pixels wide, None leaves a gap."""
    columns = max(len(row) for row in rows)
    width, height = columns * (side + _GAP) + _GAP, len(rows) * (side + _GAP + _LABEL) + _GAP
    paper = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(paper)
    font = ImageFont.load_default(11)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            if cell is None:
                continue
            left, top = _GAP + j * (side + _GAP), _GAP + i * (side + _GAP + _LABEL)
            draw.text((left, top), cell.label, _FRAME if cell.is_answer else _INK, font)
            image = Image.fromarray(cell.image)
            if image.size != (side, side):
                enlarge = side % image.width == 0
                filter = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
                image = image.resize((side, side), filter)
            paper.paste(image, (left, top + _LABEL))
            if cell.is_answer:
                box = (left - 2, top + _LABEL - 2, left + side + 1, top + _LABEL + side + 1)
                draw.rectangle(box, outline=_FRAME, width=2)
    return np.asarray(paper)


def crop_rows(pictures: Sequence[np.ndarray], rows: int = 2, side: int = 96) -> np.ndarray:
    """The first rows of several sheets, one below the other: uint8 [H, W, 3]."""
    height = rows * (side + _GAP + _LABEL) + _GAP
    width = max(picture.shape[1] for picture in pictures)
    padded = [
        np.pad(picture[:height], ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)
        for picture in pictures
    ]
    return np.concatenate(padded)


def answer_row(gap: int, images: Iterable[np.ndarray]) -> list[Cell | None]:
    """Framed answers after `gap` empty places."""
    return [*[None] * gap, *(Cell(image, "answer", True) for image in images)]


def completion_sheet(
    codes: np.ndarray,
    answer: Callable[[np.ndarray, int], np.ndarray],
    decode: Callable[[np.ndarray], np.ndarray],
    share: float = 0.5,
) -> np.ndarray:
    """A sentence above its own second half as the model completes it.

    Args:
      codes: int [grids, N].
      answer: (prompt int [k, N], number of images) → int [images, N].
      decode: codes int [B, N] → images uint8 [B, R, R, 3].
      share: how much of the sentence is the prompt.
    """
    given = max(1, round(share * len(codes)))
    if given == len(codes):
        return render_sheet([[Cell(image, f"{i + 1}") for i, image in enumerate(decode(codes))]])
    answers = answer(codes[:given], len(codes) - given)
    truth = [Cell(image, f"{i + 1}") for i, image in enumerate(decode(codes))]
    return render_sheet([truth, answer_row(given, decode(answers))])
