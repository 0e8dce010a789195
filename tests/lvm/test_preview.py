"""The preview draws every grid of a row, once, and says what a run reads."""

import numpy as np
import pytest
from PIL import Image

from lvm.data.mixture.mixture import ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.recipes import Pairs, Single
from lvm.data.mixture.rows import Rows
from lvm.model.vocabulary import Vocabulary
from lvm.preview import code_colors, render_row, report, row_cells
from tests.commands import run


@pytest.fixture
def make_rows(make_store):
    path = make_store([(1, 0)] * 6 + [(1, 1)] * 8)

    def make(context=24, **options):
        components = {"pairs": ComponentConfig(Pairs(shots=2)), "single": ComponentConfig(Single())}
        return Rows(
            Mixture(MixtureConfig(components, path, 0.0, **options), 0), Vocabulary.for_codes(16), context, 4
        )

    return make


@pytest.mark.parametrize("packing", ["concat", "whole"])
def test_all_codes_of_a_row_are_shown(make_rows, packing):
    rows = make_rows(packing=packing)
    decode = lambda codes: np.repeat(codes.reshape(-1, 2, 2, 1), 3, -1).astype(np.uint8)  # noqa: E731
    for place in range(4):
        cells = row_cells(rows, 0, place, decode)
        shown = np.concatenate([cell.image[..., 0].ravel() for cell in cells])
        tokens = rows.batch(0, np.array([place]))["tokens"][0]
        learned = np.append(False, rows.batch(0, np.array([place]))["loss_mask"][0])
        assert shown[shown < 16].tolist() == tokens[(tokens < 16) & learned].tolist()
        starts = [cell for cell in cells if cell.starts_sentence]
        assert len(starts) == np.count_nonzero(tokens == 16) - (tokens[-1] == 16)
        assert {cell.stream for cell in cells if cell.component == 1} <= {"rgb"}


def test_what_bears_no_loss_is_pale(make_rows):
    rows = make_rows(packing="whole", context=30)
    rows.mixture.config.components.pop("single")
    cells = row_cells(rows, 0, 0, code_colors((2, 2)))
    assert all(cell.image.max() > 15 for cell in cells)
    picture = render_row(cells, ["pairs", "single"], "a row")
    assert picture.ndim == 3
    assert picture.shape[1] > 8 * 96


def test_the_report_counts_tokens_and_repetitions(make_rows):
    lines = "\n".join(report(make_rows(packing="whole"), steps=100, batches=3))
    assert "tokens of the first 3 batches by component: pairs" in lines
    assert "rows are" in lines
    assert "single after 100 steps" in lines


def test_the_command_writes_pictures(make_store, tmp_path):
    flags = ["--config=tests/configs/tiny_lvm.py", f"--config.data.store={make_store([(4, 1)] * 20)}"]
    flags += [f"--config.data.components.{name}.weight=0" for name in ("depth", "edges")]
    output = run("lvm.preview", *flags, f"--out={tmp_path / 'pictures'}", "--rows=2")
    assert "every code is drawn as a colour" in output
    files = sorted((tmp_path / "pictures").iterdir())
    assert [file.name for file in files] == [f"step-0000000-row-000{i}.png" for i in range(2)]
    assert np.asarray(Image.open(files[0])).std() > 0
    assert "--rows: 3 of 1..2" in run("lvm.preview", *flags, "--out=x", "--rows=3", code=2)
