"""Evaluators in the training loop."""

import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.evaluation.evaluator import Context, NotApplicableError, StoppedError
from lvm.evaluation.figures import Estimate, Figure, Picture, Plot
from lvm.evaluation.in_training import training_evaluations
from tests.lvm.evaluation.test_report import Given

STATE = {"step": np.int32(7), "params": {"w": 1}}
NEVER = lambda: False  # noqa: E731


class Trained:
    """A model that tells its step and weights."""

    def with_params(self, params, step):
        model = Trained()
        model.params, model.step = params, step
        return model


def evaluation(given, make_context):
    context = make_context([], {})
    context.model = Trained()
    return training_evaluations({"given": given}, context)["given"]


def test_training_evaluation_names_figures_and_pictures(make_context):
    pixels = np.zeros((4, 5, 3), np.uint8)
    figures = [Figure("a", Estimate(1.5), ""), Figure("b", Estimate(float("nan")), "")]
    pictures = [Picture("Some, answers", "", pixels), Picture("A plot", "", Plot({}, "x", "y"))]
    values, shown = evaluation(Given((figures, pictures)), make_context)(STATE, NEVER)
    assert values == {"given/a": 1.5}  # NaN has no place in JSON
    assert list(shown) == ["given-some-answers", "given-a-plot"]
    assert shown["given-a-plot"].shape[2] == 3


def test_training_evaluation_sees_the_state(make_context):
    given = Given(([], []), every=3)
    seen = []
    given.__dict__["run"] = lambda context: seen.append((context, context.model)) or ([], [])
    run = evaluation(given, make_context)
    assert run.every == 3
    run(STATE, NEVER)
    run(STATE, NEVER)
    run({"step": np.int32(9), "params": {"w": 2}}, NEVER)
    assert [(model.step, model.params["w"]) for _, model in seen] == [(7, 1), (7, 1), (9, 2)]
    assert seen[0][0] is seen[1][0]  # answers of one step are shared
    assert seen[0][0].cache is not seen[2][0].cache


@pytest.mark.parametrize(("error", "result"), [(StoppedError(), None), (NotApplicableError("no depth"), ({}, {}))])
def test_training_evaluation_stops_or_is_skipped(make_context, error, result):
    assert evaluation(Given(error=error), make_context)(STATE, NEVER) == result


def test_training_evaluation_names_itself_in_errors(make_context):
    with pytest.raises(UserError, match=r"^config\.evaluations\.given: shots=9$"):
        evaluation(Given(error=UserError("shots=9")), make_context)(STATE, NEVER)


def test_training_evaluations_of_images_need_a_source(make_context):
    given, context = Given(), make_context([], {})
    given.__dict__["needs_images"] = True
    with pytest.raises(UserError, match=r"config\.evaluation_source is empty; given in config\.evaluations"):
        training_evaluations({"given": given}, Context(context.model, context.tokenizer, context.mixture))
