"""The tables of docs/scale.md."""

import pathlib
import re

import pytest

from lvm.hardware.accelerators import resolve
from scripts import table_scale
from tests.commands import ROOT


def test_page_has_the_tables_that_the_script_prints(tmp_path, monkeypatch, capsys):
    page = tmp_path / "scale.md"
    page.write_text((ROOT / "docs" / "scale.md").read_text())
    monkeypatch.setattr(table_scale, "_PAGE", page)
    assert table_scale.main(["--write"]) == 0
    assert page.read_text() == (ROOT / "docs" / "scale.md").read_text()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 6 + 2 + 2 + 3 * 2  # and two lines of headings each


def test_training_of_one_chip_by_hand():
    (_, _, row) = table_scale.training_table([(resolve("v5e-256"), 1.2)], mfu=0.5)
    cells = [float(re.sub("[$,]", "", cell)) for cell in row.strip("| ").split(" | ")[2:]]
    steps, seconds, fastest, hours, chip_hours, cost, rate, host_rate, checkpoint = cells
    assert steps == 200_272  # 420e9 / (512 · 4096)
    assert seconds == pytest.approx(2 * fastest, abs=0.02)
    assert hours == pytest.approx(steps * seconds / 3600, rel=0.01)
    assert chip_hours == pytest.approx(256 * hours, rel=0.01)
    assert cost == pytest.approx(1.2 * chip_hours, rel=1e-4)
    assert rate == pytest.approx(1.64e9 / steps / seconds, rel=0.01)
    assert host_rate == pytest.approx(rate / 64, abs=0.5)
    assert checkpoint == pytest.approx(3_275_740_800 * 12 / 64 / 1e9, abs=0.05)


def test_encoding_by_hand():
    (_, _, row) = table_scale.encoding_table([(resolve("h100-64"), 2.0)], mfu=1.0)
    chip_hours, hours, cost, rate, host_rate, *_ = (
        float(re.sub("[$,]", "", cell)) for cell in row.strip("| ").split(" | ")[1:]
    )
    assert rate == pytest.approx(64 * 989e12 / 216.3e9, abs=1)
    assert host_rate == pytest.approx(rate / 8, abs=1)
    assert hours == pytest.approx(1.64e9 / rate / 3600, abs=0.05)
    assert cost == pytest.approx(2 * chip_hours, abs=2)


def test_write_replaces_a_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- t: written by scripts.table_scale -->\nold\n<!-- end of t -->\nb\n")
    table_scale.write(pathlib.Path(page), {"t": ["| x |"]})
    assert page.read_text().split() == (
        [
            "a",
            "<!--",
            "t:",
            "written",
            "by",
            "scripts.table_scale",
            "-->",
            "|",
            "x",
            "|",
            "<!--",
            "end",
            "of",
            "t",
            "-->",
            "b",
        ]
    )
