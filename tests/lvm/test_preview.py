"""`lvm preview`: every code of a row is rendered once, and the report counts tokens and repetitions."""

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
        mixture = Mixture(MixtureConfig(components, (path,), 0.0, **options), 0)
        return Rows(mixture, Vocabulary.for_codes(16), context, 4)

    return make


@pytest.mark.parametrize("packing", ["concat", "whole"])
def test_row_cells_show_all_codes_of_a_row(make_rows, packing):
    rows = make_rows(packing=packing)
    decode = lambda codes: np.repeat(codes.reshape(-1, 2, 2, 1), 3, -1).astype(np.uint8)  # noqa: E731
    streams = set()
    for row in range(4):
        cells = row_cells(rows, 0, row, decode)
        codes = np.concatenate([cell.image[..., 0].ravel() for cell in cells])
        batch = rows.batch(0, np.array([row]))
        tokens, loss_mask = batch["tokens"][0], np.append(False, batch["loss_mask"][0])
        assert codes[codes < 16].tolist() == tokens[(tokens < 16) & loss_mask].tolist()
        starts = [cell for cell in cells if cell.starts_sentence]
        assert len(starts) == np.count_nonzero(tokens == 16) - (tokens[-1] == 16)
        streams |= {cell.stream for cell in cells if cell.component == 1}
    assert streams == {"rgb"}


def test_render_row_with_pale_grids(make_rows):
    rows = make_rows(packing="whole", context=30)
    rows.mixture.config.components.pop("single")
    cells = row_cells(rows, 0, 0, code_colors((2, 2)))
    assert all(cell.image.max() > 15 for cell in cells)
    image = render_row(cells, ["pairs", "single"], "a row")
    assert image.ndim == 3
    assert image.shape[1] > 8 * 96


def test_report_counts_tokens_and_repetitions(make_rows):
    lines = "\n".join(report(make_rows(packing="whole"), steps=100, batches=3))
    assert "tokens of the first 3 batches by component: pairs" in lines
    assert "rows are" in lines
    assert "single after 100 steps" in lines


def test_preview_writes_images(make_store, tmp_path):
    flags = ["--config=tests/configs/tiny_lvm.py", f"--config.data.store={make_store([(4, 1)] * 20)}"]
    flags += [f"--config.data.components.{name}.weight=0" for name in ("depth", "edges")]
    output = run("lvm.preview", *flags, f"--out={tmp_path / 'images'}", "--rows=2")
    assert "codes are rendered as colors" in output
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == [f"step-0000000-row-000{i}.png" for i in range(2)]
    assert np.asarray(Image.open(files[0])).std() > 0
    assert "--rows=3" in run("lvm.preview", *flags, "--out=x", "--rows=3", code=2)
