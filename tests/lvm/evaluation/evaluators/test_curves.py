"""Curves of training."""

import pytest

from lvm.evaluation.evaluator import NotApplicableError
from lvm.evaluation.evaluators.curves import Curves, metric_curve


def test_curves_of_the_folders_that_have_metrics(make_context, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    folders = {"model": str(tmp_path / "model"), "tokenizer": str(tmp_path / "none")}
    _, (picture,) = Curves().run(make_context([], {}, folders=folders))
    assert picture.title == "Loss of the model"
    assert picture.content.series == {"loss": [(1, 2.0), (2, 1.0)]}
    with pytest.raises(NotApplicableError):
        Curves().run(make_context([], {}, folders={"tokenizer": str(tmp_path / "none")}))


def test_metric_curve_takes_the_records_with_the_key():
    records = [{"step": 1, "loss": 3.0}, {"step": 2, "heldout_loss": 9.0}, {"step": 3, "loss": 1.0}]
    assert metric_curve(records, "loss") == [(1, 3.0), (3, 1.0)]
    assert metric_curve(records, "perplexity") == []
