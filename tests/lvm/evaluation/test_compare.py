"""Several models on one page: paired differences, and scores against size."""

import json

import numpy as np
import pytest

from lvm import evaluate
from lvm.common.errors import UserError
from lvm.evaluation import report
from lvm.evaluation.compare import compare, load_all, write_comparison
from lvm.evaluation.figures import Estimate, Figure, Picture, estimate
from lvm.evaluation.run import run_evaluations
from tests.lvm.evaluation.test_report import Given, Page

SCORES = np.random.default_rng(0).random(40)
PIXELS = np.zeros((4, 6, 3), np.uint8)


class Asking(Given):
    """Gives figures of stored questions."""

    questions = 40

    def run(self, context):
        context.episodes = list(range(self.questions))
        return super().run(context)


@pytest.fixture
def evaluated(tmp_path, make_context):
    """(name, scores, parameters) → an output of `lvm evaluate`."""

    def make(name, scores, parameters=10, questions=40, **further):
        figures = [
            Figure("iou", estimate(scores), "IoU", "", True, {"copied": estimate(SCORES / 2)}),
            Figure("error", estimate(-scores), "error", "%", False),
        ]
        asking = Asking((figures, [Picture("Answers", "given", PIXELS)]))
        asking.__dict__["questions"] = questions
        loss = Given(([Figure("loss", Estimate(3 - scores.mean()), "loss", "nats", False)], []))
        request = {"model": {"parameters": parameters, "step": 7}}
        out = tmp_path / name
        records = run_evaluations({"task": asking, "likelihood": loss, **further}, make_context([], {}), out, request)
        report.write_report(out, report.collect_results(request, records), records)
        return str(out)

    return make


def test_differences_are_those_of_a_paired_bootstrap(evaluated):
    """Every question is a little better: the models' own intervals overlap, that of the difference is above 0."""
    other = SCORES + np.random.default_rng(1).normal(0.02, 0.02, 40)
    models = load_all([evaluated("a", SCORES), evaluated("b", other)])
    by_model = compare(models)["figures"]["task"]["iou"]
    first, second = by_model["a"], by_model["b"]
    assert "difference" not in first
    assert first["interval"][1] > second["interval"][0]
    assert second["difference"]["value"] == pytest.approx((other - SCORES).mean())
    indices = np.random.default_rng(0).integers(40, size=(2000, 40))
    expected = np.percentile((other - SCORES)[indices].mean(1), [2.5, 97.5])
    np.testing.assert_allclose(second["difference"]["interval"], expected, atol=1e-6)
    assert expected[0] > 0


def test_other_questions_and_settings_are_not_paired(evaluated):
    paths = [evaluated("a", SCORES), evaluated("b", SCORES, questions=41), evaluated("c", SCORES)]
    record = json.loads((models := load_all(paths))[2].folder.joinpath("evaluations", "task.json").read_text())
    record["evaluator"] = {"shots": 3}
    models[2].folder.joinpath("evaluations", "task.json").write_text(json.dumps(record))
    figures = compare(load_all(paths))["figures"]["task"]["iou"]
    assert ["difference" in figures[name] for name in "abc"] == [False, False, False]


def test_figures_of_another_version_are_not_paired(evaluated, monkeypatch):
    paths = [evaluated("a", SCORES)]
    monkeypatch.setattr("lvm.evaluation.run._VERSION", 99)
    figures = compare(load_all([*paths, evaluated("b", SCORES)]))["figures"]["task"]["iou"]
    assert "difference" not in figures["b"]


def test_difference_without_intervals_has_no_verdict(evaluated, tmp_path):
    write_comparison(tmp_path / "out", load_all([evaluated("a", SCORES[:5]), evaluated("b", SCORES[:5] + 0.1)]))
    content = "|".join(Page((tmp_path / "out" / "index.html").read_text()).text)
    assert "|+0.100|" in content
    assert "better" not in content.partition("iou, b")[2].partition("error, a")[0]


def test_comparison_page_shows_models_differences_and_plots(evaluated, tmp_path):
    extra = Given(([Figure("new", Estimate(1.0), "x", "", None)], []))
    paths = [evaluated("a", SCORES), evaluated("b", SCORES + 0.1, 1000), evaluated("c", SCORES - 0.1, 20, extra=extra)]
    write_comparison(tmp_path / "out", load_all(paths))
    page = Page((tmp_path / "out" / "index.html").read_text())
    content = "|".join(page.text)
    assert f"iou, b|{SCORES.mean() + 0.1:.3f}|" in content
    assert "|+0.100 (+0.100 to +0.100), better|" in content
    assert "|−10.0% (−10.0% to −10.0%), better|" in content  # of an error, less is better
    assert "|−0.100 (−0.100 to −0.100), worse|" in content
    assert "a|10|7|" in content
    assert "b|1,000|7|" in content
    assert "new, c|1.000" in content
    assert content.count("copied") == 1
    assert "Task against parameters" in content
    assert "training steps" in content
    assert "Task against training steps" not in content  # equal for all
    assert "Task against held-out loss in nats" in content
    assert "Likelihood against parameters" in content
    assert "Likelihood against held-out loss" not in content
    assert content.count("Answers: ") == 3
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert saved["models"]["b"]["parameters"] == 1000
    assert saved["models"]["b"]["loss"] == pytest.approx(3 - SCORES.mean() - 0.1)
    assert list(saved["figures"]["extra"]["new"]) == ["c"]


def test_models_are_named_by_what_tells_them_apart(evaluated):
    models = load_all([evaluated("a/out", SCORES), evaluated("b/out", SCORES)])
    assert [model.name for model in models] == ["a/out", "b/out"]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "must be two different folders or more"),
        (["same"], "must be two different folders or more"),
        (["same/"], "names a folder twice"),
        (["nowhere"], "nowhere has no results.json; give outputs"),
    ],
)
def test_compare_rejects_other_folders(evaluated, tmp_path, others, message):
    path = evaluated("same", SCORES)
    with pytest.raises(UserError, match=message):
        load_all([path, *(f"{tmp_path}/{name}" for name in others)])


def test_compare_is_a_command(evaluated, tmp_path, capsys):
    paths = ",".join([evaluated("a", SCORES), evaluated("b", SCORES)])
    assert evaluate.main([f"--compare={paths}", f"--out={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "comparison.json").exists()
    assert evaluate.main([f"--compare={tmp_path}", f"--out={tmp_path / 'out'}"]) == 2
    assert "must be two different folders" in capsys.readouterr().err
