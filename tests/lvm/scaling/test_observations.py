"""Tables of runs: columns by name, other layouts, bad input named, rows left out with a reason."""

import contextlib
import math
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.scaling.observations import drop_outliers, read_csv, select
from tests.lvm.sweeps import CHINCHILLA_CSV, isoflop_rows, make_rows, needs_chinchilla_csv, write_csv

positive = st.floats(1e-3, 1e25)


def write(tmp_path, text):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    return path


@given(values=st.lists(st.tuples(positive, positive, positive), min_size=1, max_size=8, unique=True))
def test_csv_reads_what_was_written(tmp_path_factory, values):
    rows = make_rows(*np.array(values).T)
    read = read_csv(write_csv(tmp_path_factory.mktemp("csv") / "runs.csv", rows))
    for name in ("params", "tokens", "flops", "loss"):
        np.testing.assert_array_equal(getattr(read, name), getattr(rows, name))
    assert read.name.tolist() == [str(i + 1) for i in range(len(values))]


@given(text=st.text(alphabet=string.printable + "é\0", max_size=200))
def test_csv_of_any_text_is_read_or_rejected(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("csv") / "runs.csv"
    path.write_bytes(text.encode())
    with contextlib.suppress(UserError):  # any other exception fails
        assert len(read_csv(path))


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("N,D,Loss", "10,20,3"),
        ("num_params,train_tokens,val_loss", "10,20,3"),
        ("Model Size,Training FLOP,loss", "10,1200,3"),
        ("tokens,compute,Eval Loss", "20,1200,3"),
        ("\ufeffparams,tokens,budget,loss", "10,20,1200,3"),
    ],
)
def test_csv_layouts_agree(tmp_path, header, line):
    rows = read_csv(write(tmp_path, f"{header}\n{line}\n"))
    values = [rows.params[0], rows.tokens[0], rows.flops[0], rows.loss[0]]
    np.testing.assert_allclose(values, [10, 20, 1200, 3])


def test_csv_columns_are_chosen_by_name(tmp_path):
    path = write(tmp_path, "params,size,tokens,loss\n1,10,20,3\n")
    assert read_csv(path, {"params": "size"}).params[0] == 10
    with pytest.raises(UserError, match="--columns=params=width"):
        read_csv(path, {"params": "width"})
    with pytest.raises(UserError, match="'height'"):
        read_csv(path, {"height": "size"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("params,tokens,loss\n", "no rows"),
        ("params,loss\n1,2\n", "tokens, flops"),
        ("params,tokens\n1,2\n", "loss"),
        ("params,tokens,loss\n1,2,nan\n", "row 1: loss is 'nan'"),
        ("params,tokens,loss\n1,2,3\n0,2,3\n", "row 2: params is '0'"),
        ("params,tokens,loss\n1,2,x\n", "row 1: loss is 'x'"),
        ("params,tokens,loss\n1,2,3\n4,5\n", "row 2: 2 cells"),
        ("params,tokens,loss\n1,2,3\n4,5,6\n1,2,3\n", "row 3 equals row 1"),
        ("params,params,tokens,loss\n1,2,3,4\n", "2 columns are named 'params'"),
        ("params,tokens,loss,score/iou\n1,2,3,high\n", "score/iou is 'high'"),
    ],
)
def test_csv_rejects_bad_tables(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_csv(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_csv_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_csv(tmp_path / "none.csv")


def test_csv_reads_downstream_metrics(tmp_path):
    rows = read_csv(write(tmp_path, "params,tokens,loss,score/iou,color\n1,2,3,0.5,red\n2,2,2,,blue\n"))
    assert rows.metrics["score/iou"][0] == 0.5
    assert math.isnan(rows.metrics["score/iou"][1])
    assert list(rows.metrics) == ["score/iou"]


@needs_chinchilla_csv
def test_select_leaves_217_rows_of_chinchilla_csv():
    rows = read_csv(CHINCHILLA_CSV)
    assert len(rows) == 245
    assert len(select(rows, drop_highest=5)) == 240
    assert len(select(rows, drop_highest=5, max_flops=1e21)) == 217


def test_select_gives_reasons():
    rows = make_rows(np.array([1.0, 2, 3, 4]), np.ones(4), np.array([9.0, 3, 2, 1]))
    kept = select(rows, drop_highest=1, min_flops=13, max_flops=24)
    assert kept.name.tolist() == ["2"]
    assert kept.excluded == {
        "0": "one of the 1 highest losses",
        "1": "fewer than 13 FLOPs",
        "3": "24 FLOPs or more",
    }
    with pytest.raises(UserError, match="--drop_highest=9"):
        select(rows, drop_highest=9)


def test_outliers_are_dropped_with_their_residual():
    rows = isoflop_rows(sizes=4)
    residuals = np.where(np.arange(len(rows)) == 7, -0.2, 0.01 * np.sin(np.arange(len(rows))))
    kept = drop_outliers(rows, residuals, 5)
    assert list(kept.excluded) == ["7"]
    assert "+22.14%" in kept.excluded["7"]
    assert len(kept) == len(rows) - 1


def test_budgets_group_flops_by_tolerance():
    flops = np.array([1e20, 1.1e18, 1e18, 1.2e18, 1.05e20, 3e18])
    rows = make_rows(flops / 6, np.ones(6), np.ones(6))
    assert rows.budgets().tolist() == [2, 0, 0, 0, 2, 1]
