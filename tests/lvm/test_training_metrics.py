"""`metrics.jsonl` holds each step once, whatever cut the run off."""

import pytest

from lvm.training import metrics
from lvm.training.metrics import FILENAME, MetricsWriter


def write(folder, start, steps):
    writer = MetricsWriter(folder, start)
    for step in steps:
        writer.write(step, {"loss": 1 / step})
    writer.close()


def steps(folder):
    return [line["step"] for line in metrics.read(folder)]


def test_lines_come_back_in_order(tmp_path):
    write(tmp_path, 0, [1, 2, 3])
    assert metrics.read(tmp_path) == [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]


def test_a_folder_without_metrics_has_no_lines(tmp_path):
    assert metrics.read(tmp_path) == []


@pytest.mark.parametrize(
    ("resumed", "kept"), [(0, []), (25, [10, 20]), (30, [10, 20, 30]), (99, [10, 20, 30])]
)
def test_a_resumed_run_drops_what_lies_beyond_its_step(tmp_path, resumed, kept):
    write(tmp_path, 0, [10, 20, 30])
    write(tmp_path, resumed, [resumed + 10])
    assert steps(tmp_path) == [*kept, resumed + 10]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 2.0})
    assert steps(tmp_path) == [1]
    writer.close()


@pytest.mark.parametrize("rest", ['{"step": 30, "lo', '{"step": 30, "loss": 1.0}'])
def test_a_line_cut_off_by_a_kill_is_left_out_and_written_over(tmp_path, rest):
    write(tmp_path, 0, [10, 20])
    with open(tmp_path / FILENAME, "a") as file:
        file.write(rest)
    assert steps(tmp_path) == [10, 20]
    write(tmp_path, 20, [30])
    assert (tmp_path / FILENAME).read_text().count("\n") == 3
    assert steps(tmp_path) == [10, 20, 30]
