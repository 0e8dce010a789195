"""Evaluations in the loop: their intervals, figures and pictures."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from lvm.training import metrics
from lvm.training.loop import Loop
from tests.lvm.training import test_loop


@dataclasses.dataclass
class Counted:
    """An evaluation that returns its step; None as if the run were to end, from `stop_at` on."""

    every: int
    stop_at: int = 99
    steps: list[int] = dataclasses.field(default_factory=list)

    def __call__(self, state, stopping):
        step = int(state["step"])
        self.steps.append(step)
        return (
            None if step >= self.stop_at else ({"counted/step": step}, {"counted": np.full((2, 3, 3), step, np.uint8)})
        )


@pytest.fixture
def train_with(monkeypatch, tmp_path):
    """(evaluations) → the workdir of a run of seven steps with them."""

    def train(evaluations, **options):
        monkeypatch.setattr(test_loop, "Loop", lambda *args, **kwargs: Loop(*args, **kwargs, evaluations=evaluations))
        test_loop.train(tmp_path, total=7, log_every=10, **options)
        return tmp_path

    return train


def test_evaluations_run_at_their_intervals_and_at_the_end(train_with):
    often, last = Counted(3), Counted(0)
    workdir = train_with({"often": often, "last": last})
    assert (often.steps, last.steps) == ([3, 6, 7], [7])
    records = {line["step"]: line for line in metrics.read_metrics(workdir)}
    assert [records[step]["counted/step"] for step in (3, 6, 7)] == [3, 6, 7]
    names = sorted(path.name for path in (workdir / "pictures").glob("counted-*"))
    assert names == [f"counted-{step:07d}.png" for step in (3, 6, 7)]
    assert (np.asarray(Image.open(workdir / "pictures" / names[1])) == 6).all()


def test_evaluations_end_once_the_run_is_to_end(train_with):
    stopped, later = Counted(3, stop_at=6), Counted(3)
    workdir = train_with({"stopped": stopped, "later": later})
    assert later.steps == [3]
    assert 6 not in [line["step"] for line in metrics.read_metrics(workdir)]
