"""Layout of contact sheets."""

import numpy as np
import pytest

from lvm.inference.contact_sheet import (
    _BACKGROUND,
    _FRAME,
    _GAP,
    _LABEL,
    Cell,
    answer_row,
    completion_sheet,
    crop_rows,
    render_sheet,
)


def plain(color, side=8):
    return np.full((side, side, 3), color, np.uint8)


def cell_at(picture, row, column, side):
    top = _GAP + row * (side + _GAP + _LABEL) + _LABEL
    left = _GAP + column * (side + _GAP)
    return picture[top : top + side, left : left + side]


def test_render_sheet_places_images_and_gaps():
    rows = [[Cell(plain(10)), Cell(plain(20))], [None, Cell(plain(30))]]
    picture = render_sheet(rows, side=8)
    assert picture.shape == (2 * (8 + _GAP + _LABEL) + _GAP, 2 * (8 + _GAP) + _GAP, 3)
    assert picture.dtype == np.uint8
    for row, column, color in ((0, 0, 10), (0, 1, 20), (1, 1, 30)):
        np.testing.assert_array_equal(cell_at(picture, row, column, 8), plain(color))
    np.testing.assert_array_equal(cell_at(picture, 1, 0, 8), np.broadcast_to(_BACKGROUND, (8, 8, 3)))


def test_render_sheet_enlarges_without_blur():
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(cell_at(render_sheet([[Cell(image)]], 8), 0, 0, 8), image.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("size", [3, 16])
def test_render_sheet_resizes_images(size):
    np.testing.assert_array_equal(cell_at(render_sheet([[Cell(plain(99, size))]], 8), 0, 0, 8), plain(99))


def test_render_sheet_frames_answers_only():
    picture = render_sheet([[Cell(plain(10)), Cell(plain(20), "", True)]], side=8)
    framed = (picture == _FRAME).all(-1)
    assert framed[:, : _GAP + 8].sum() == 0
    assert framed.sum() > 4 * 8
    np.testing.assert_array_equal(cell_at(picture, 0, 1, 8), plain(20))  # not covered by the frame


def test_render_sheet_puts_labels_above_images():
    without, labeled = render_sheet([[Cell(plain(0))]], 32), render_sheet([[Cell(plain(0), "depth")]], 32)
    changed = (without != labeled).any((1, 2))
    assert changed.any()
    assert not changed[_GAP + _LABEL :].any()


def test_answer_row_starts_after_the_gap():
    row = answer_row(2, [plain(1), plain(2)])
    assert row[:2] == [None, None]
    assert [(int(cell.image[0, 0, 0]), cell.is_answer) for cell in row[2:]] == [(1, True), (2, True)]


@pytest.mark.parametrize(("grids", "fraction", "prompt"), [(4, 0.5, 2), (3, 0.5, 2), (5, 0.2, 1), (2, 0.1, 1)])
def test_completion_sheet_completes_the_prompt(grids, fraction, prompt):
    codes = np.arange(grids * 3).reshape(grids, 3)
    calls = []

    def answer(codes, num_images):
        calls.append((codes.tolist(), num_images))
        return np.full((num_images, 3), 200)

    def decode(codes):
        return np.stack([plain(grid[0], 96) for grid in codes])

    picture = completion_sheet(codes, answer, decode, fraction)
    assert calls == [(codes[:prompt].tolist(), grids - prompt)]
    for column in range(grids):
        np.testing.assert_array_equal(cell_at(picture, 0, column, 96), plain(3 * column, 96))
        below = 200 if column >= prompt else 255
        assert (cell_at(picture, 1, column, 96)[4:-4, 4:-4] == below).all()


def test_completion_sheet_of_a_single_image():
    picture = completion_sheet(np.zeros((1, 3), int), _fail, lambda codes: plain(7, 96)[None])
    np.testing.assert_array_equal(cell_at(picture, 0, 0, 96), plain(7, 96))


def _fail(codes, num_images):
    raise AssertionError("unexpected call")


def test_crop_rows_pads_narrow_sheets_with_white():
    sheets = [np.full((200, width, 3), value, np.uint8) for width, value in ((5, 1), (3, 2))]
    height = 2 * (20 + _GAP + _LABEL) + _GAP
    stacked = crop_rows(sheets, side=20)
    np.testing.assert_array_equal(stacked[:height], sheets[0][:height])
    np.testing.assert_array_equal(stacked[height:, :3], sheets[1][:height])
    assert (stacked[height:, 3:] == 255).all()
