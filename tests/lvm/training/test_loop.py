"""The loop: interrupted and resumed anywhere, a run has the bits of an uninterrupted one."""

import functools
import json
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest

from lvm.common import cli
from lvm.common.errors import DivergedError, UserError
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.training import metrics
from lvm.training.checkpoint import Checkpoints, latest_step
from lvm.training.loop import Loop, LoopConfig, is_finished
from lvm.training.step import Step
from lvm.training.task import init_skip_counts, make_update
from lvm.training.workdir import Workdir
from tests.commands import ROOT

TRUTH = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
TIMES = re.compile("(step_seconds|input_wait_fraction|tokens_per_second|goodput|badput/.*)$")  # differ between runs


class Regression:
    """Linear regression with noise from the step's key: a wrong key or batch changes the bits."""

    logical_axes = {"kernel": ("embed",)}  # noqa: RUF012
    batch_spec = {  # noqa: RUF012
        "x": jax.ShapeDtypeStruct((8, 8), jnp.float32),
        "y": jax.ShapeDtypeStruct((8,), jnp.float32),
    }

    def __init__(self):
        self.optimizer = optax.adam(0.05)
        self.update = make_update(self._loss, self.optimizer, optax.constant_schedule(0.05))
        self.evaluated = []

    def init(self, rng):
        params = {"kernel": jax.random.normal(rng, 8)}
        return {
            "step": jnp.int32(0),
            "params": params,
            "training": {"optimizer": self.optimizer.init(params), "skipped": init_skip_counts()},
        }

    def _loss(self, params, batch, rng):
        noise = 0.01 * jax.random.normal(rng, batch["y"].shape)
        losses = (batch["x"] @ params["kernel"] - batch["y"] + noise) ** 2
        # The second component has no tokens.
        total, count = losses.sum(), jnp.float32(len(losses))
        nothing = jnp.float32(0)
        return total, {"loss": (total, count), "loss/here": (total, count), "loss/absent": (nothing, nothing)}

    def evaluate(self, state, stopping):
        self.evaluated.append(int(state["step"]))
        return {"heldout_loss": float(jnp.sum(state["params"]["kernel"] ** 2))}

    def pictures(self, state):
        return {"answers": np.full((2, 3, 3), int(state["step"]) % 256, np.uint8)}


def read_batch(step):
    x = np.random.default_rng([7, step]).normal(size=(8, 8)).astype(np.float32)
    return {"x": x, "y": x[:, :4] @ TRUTH}


def nan_from(first):
    def read(step):
        batch = read_batch(step)
        return {**batch, "y": batch["y"] * np.float32("nan" if step >= first else 1)}

    return read


def broken_at(step):
    """Reads batches, but fails at that of `step`."""

    def read(number):
        if number == step:
            raise RuntimeError("the disk is gone")
        return read_batch(number)

    return read


def stopping_at(step, read=read_batch):
    """Reads batches, with SIGTERM at that of `step`."""

    def stopping(number):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(number)

    return stopping


def release(folder):
    """Releases the lock as the end of a process would: the raised error still refers to the run that holds it."""
    (folder / ".lock").unlink()


def make_step(task, seed=0):
    return Step(task, make_mesh(MeshConfig(data=4, fsdp=2)), seed)


@functools.cache
def regression_step(seed):
    """The step of most runs here: compiling it for each of them would dominate the time of these tests."""
    return make_step(Regression(), seed)


def train(folder, total=6, read=read_batch, task=None, tokens_per_step=0, seed=0, branch=None, **options):
    options = {"log_every": 1, "checkpoint_every": 2, "evaluate_every": 0, "picture_every": 0, **options}
    workdir = Workdir(folder, "lvm", {"config": {}})
    config = LoopConfig(total_steps=total, **options)
    step = make_step(task, seed) if task else regression_step(seed)
    read_rows = lambda index, rows: {name: x[rows] for name, x in read(index).items()}  # noqa: E731
    return Loop(step, read_rows, config, workdir, tokens_per_step, branch=branch).run()


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def timeless(folder):
    return [{k: v for k, v in line.items() if not TIMES.match(k)} for line in metrics.read_metrics(folder)]


def test_resumed_run_has_bits_and_metrics_of_unbroken(tmp_path):
    whole = train(tmp_path / "whole", total=6)
    with pytest.raises(SystemExit):
        train(tmp_path / "resumed", total=6, read=stopping_at(3))
    release(tmp_path / "resumed")
    resumed = train(tmp_path / "resumed", total=6)
    assert bits(resumed) == bits(whole)
    assert timeless(tmp_path / "resumed") == timeless(tmp_path / "whole")
    assert [line["step"] for line in metrics.read_metrics(tmp_path / "resumed")] == [1, 2, 3, 4, 5, 6]


def test_branch_goes_on_from_kept_step_of_its_trunk(tmp_path):
    trunk = train(tmp_path / "trunk", total=9, checkpoint_every=0, keep=1, keep_steps=(3,))
    trunk_bits = bits(trunk)
    release(tmp_path / "trunk")
    # With the trunk's own schedule a branch is the trunk; broken after its first checkpoint it resumes from its own.
    branch = (str(tmp_path / "trunk"), 3)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        train(tmp_path / "branch", total=9, read=broken_at(7), branch=branch)
    release(tmp_path / "branch")
    assert latest_step(tmp_path / "branch") == 6
    assert bits(train(tmp_path / "branch", total=9, branch=branch)) == trunk_bits
    assert [line["step"] for line in metrics.read_metrics(tmp_path / "branch")] == [4, 5, 6, 7, 8, 9]
    assert timeless(tmp_path / "branch") == timeless(tmp_path / "trunk")[3:]


def test_branch_refuses_step_that_trunk_lacks(tmp_path):
    train(tmp_path / "trunk", total=4, keep=2)
    with pytest.raises(UserError, match=r"trunk: no checkpoint of step 3; it has 2, 4"):
        train(tmp_path / "branch", branch=(str(tmp_path / "trunk"), 3))


def test_metrics_of_lost_steps_are_logged_once(tmp_path):
    train(tmp_path / "whole", total=6)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        train(tmp_path / "cut", total=6, read=broken_at(5))
    assert latest_step(tmp_path / "cut") == 4
    release(tmp_path / "cut")
    train(tmp_path / "cut", total=6)
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")


def test_seed_changes_run(tmp_path):
    assert bits(train(tmp_path / "a", total=1, seed=0)) != bits(train(tmp_path / "b", total=1, seed=1))


def test_every_step_has_its_own_key(tmp_path):
    class Recorder(Regression):
        def _loss(self, params, batch, rng):
            loss, sums = super()._loss(params, batch, rng)
            return loss, {**sums, "uniform": (jax.random.uniform(rng), jnp.float32(1))}

    train(tmp_path, total=10, task=Recorder(), checkpoint_every=0)
    assert len({line["uniform"] for line in metrics.read_metrics(tmp_path)}) == 10


def test_batches_arrive_once_in_order(tmp_path):
    class Recorder(Regression):
        batch_spec = {**Regression.batch_spec, "number": jax.ShapeDtypeStruct((8,), jnp.float32)}  # noqa: RUF012

        def _loss(self, params, batch, rng):
            loss, sums = super()._loss(params, batch, rng)
            return loss, {**sums, "seen": (batch["number"].sum(), jnp.float32(8))}

    def read(step):
        return {**read_batch(step), "number": np.full(8, step, np.float32)}

    train(tmp_path, total=30, read=read, task=Recorder(), checkpoint_every=0)
    assert [line["seen"] for line in metrics.read_metrics(tmp_path)] == list(range(30))


def test_loop_learns(tmp_path):
    state = train(tmp_path, total=400, log_every=100, checkpoint_every=0)
    np.testing.assert_allclose(state["params"]["kernel"][:4], TRUTH, atol=0.05)


def test_metrics_are_written_when_due_and_at_end(tmp_path):
    task = Regression()
    train(tmp_path, total=7, task=task, log_every=3, evaluate_every=2, tokens_per_step=80)
    lines = {line["step"]: line for line in metrics.read_metrics(tmp_path)}
    assert {step for step, line in lines.items() if "loss" in line} == {3, 6, 7}
    assert {step for step, line in lines.items() if "heldout_loss" in line} == {2, 4, 6, 7}
    assert task.evaluated == [2, 4, 6, 7]
    last = lines[7]
    assert last["tokens"] == 7 * 80
    np.testing.assert_allclose(last["perplexity"], np.exp(last["loss"]))
    np.testing.assert_allclose(last["tokens_per_second"], 80 / last["step_seconds"])
    assert 0 <= last["input_wait_fraction"] <= 1
    assert {"loss/here", "grad_norm", "param_norm", "learning_rate"} <= set(last)
    assert "loss/absent" not in last
    assert json.dumps(lines, allow_nan=False)


def test_pictures_are_written_when_due_and_at_end(tmp_path):
    train(tmp_path, total=5, picture_every=2)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == [f"answers-{step:07d}.png" for step in (2, 4, 5)]
    picture = np.asarray(PIL.Image.open(tmp_path / "pictures" / names[1]))
    np.testing.assert_array_equal(picture, np.full((2, 3, 3), 4))


def test_finished_run_does_nothing(tmp_path, caplog):
    first = train(tmp_path, total=3)
    workdir = Workdir(tmp_path, "lvm", {"config": {}})
    assert is_finished(workdir, LoopConfig(total_steps=3))
    assert f"{tmp_path}: training is complete at step 3" in caplog.text
    assert not is_finished(workdir, LoopConfig(total_steps=4))
    del workdir  # releases its lock
    assert bits(train(tmp_path, total=3)) == bits(first)
    assert len(metrics.read_metrics(tmp_path)) == 3


def test_fresh_workdir_is_not_finished(tmp_path):
    assert not is_finished(Workdir(tmp_path, "lvm", {}), LoopConfig(total_steps=1))


def test_nonfinite_gradient_changes_counts_alone(tmp_path, caplog):
    def nan_at_third(step):
        return nan_from(2)(step) if step == 2 else read_batch(step)

    skipped = train(tmp_path / "skipped", total=3, read=nan_at_third)
    before = train(tmp_path / "before", total=2)
    assert bits(skipped["params"]) == bits(before["params"])
    assert bits(skipped["training"]["optimizer"]) == bits(before["training"]["optimizer"])
    assert "step 3: the gradient is not finite; skipped, 1 in a row" in caplog.text
    after = train(tmp_path / "skipped", total=6, read=nan_at_third)
    assert {name: int(x) for name, x in after["training"]["skipped"].items()} == {
        "skipped_steps": 1,
        "skipped_in_row": 0,
    }
    assert np.isfinite(after["params"]["kernel"]).all()


def test_out_of_memory_is_one_line_with_advice(tmp_path):
    class Full(Step):
        def __call__(self, state, batch, index=None):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating\n 99 bytes")

    workdir = Workdir(tmp_path, "lvm", {"config": {}})
    step = Full(Regression(), make_mesh(MeshConfig(data=4, fsdp=2)), 0)
    read_rows = lambda index, rows: {name: x[rows] for name, x in read_batch(index).items()}  # noqa: E731
    loop = Loop(step, read_rows, LoopConfig(total_steps=2), workdir, memory_advice=lambda: "take less")
    with pytest.raises(UserError) as error:
        loop.run()
    assert str(error.value) == ("out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes; take less")


@pytest.mark.parametrize("log_every", [1, 100])
def test_max_skipped_ends_run_and_names_batches(tmp_path, log_every):
    with pytest.raises(DivergedError, match=rf"{tmp_path}: no finite gradient in 3 steps up to 7"):
        train(tmp_path, total=99, read=nan_from(4), max_skipped=3, checkpoint_every=2, log_every=log_every)
    state, _ = restore(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    batches = json.loads((tmp_path / "diverged.json").read_text())["batches"]
    assert list(batches) == ["4", "5", "6"]
    assert all(len(digest) == 64 for digest in batches.values())


def restore(folder):
    """The latest state that a run saved."""
    step = make_step(Regression())
    checkpoints = Checkpoints(folder, read_only=True)
    restored = checkpoints.restore(checkpoints.latest_step(), step.state)
    checkpoints.close()
    return restored


def test_profile_traces_chosen_and_requested_steps(tmp_path):
    train(tmp_path, total=4, profile=(2, 3))
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    release(tmp_path)
    (tmp_path / "profile.request").touch()
    train(tmp_path, total=8)
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 2
    assert not (tmp_path / "profile.request").exists()


def test_tensorboard_events_are_written(tmp_path):
    train(tmp_path, total=3, tokens_per_step=80)
    assert list((tmp_path / "tensorboard").glob("events.*"))
    line = metrics.read_metrics(tmp_path)[-1]
    assert 0 < line["goodput"] <= 1
    assert line["skipped_steps"] == 0


def test_sigterm_during_report_saves_that_step(tmp_path):
    class Interrupted(Regression):
        def evaluate(self, state, stopping):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().evaluate(state, stopping)

    with pytest.raises(SystemExit) as ended:
        train(tmp_path, total=9, task=Interrupted(), evaluate_every=3, checkpoint_every=0)
    assert ended.value.code == 75
    assert latest_step(tmp_path) == 3


def test_sigterm_saves_without_evaluating(tmp_path):
    task = Regression()
    with pytest.raises(SystemExit):
        train(tmp_path, total=99, task=task, read=stopping_at(10), checkpoint_every=0)
    assert task.evaluated == []
    assert latest_step(tmp_path) > 0


def test_signal_handler_is_restored_after_run(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(tmp_path, total=1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_exits_75_and_run_resumes(tmp_path):
    command = [sys.executable, __file__, f"--workdir={tmp_path / 'stopped'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    stopped = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    saved = latest_step(tmp_path / "stopped")
    assert stopped.returncode == 75, stopped.stderr
    assert f"SIGTERM: saved at step {saved}, after" in stopped.stderr
    assert 0 < saved < 40
    assert [line["step"] for line in metrics.read_metrics(tmp_path / "stopped")] == list(range(1, saved + 1))
    resumed = train(tmp_path / "stopped", total=40, checkpoint_every=0)
    assert bits(resumed) == bits(train(tmp_path / "whole", total=40, checkpoint_every=0))
    assert timeless(tmp_path / "stopped") == timeless(tmp_path / "whole")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("log_every", 0, "be positive"),
        ("keep", 0, "be positive"),
        ("evaluate_every", -1, "not be negative"),
        ("picture_every", -1, "not be negative"),
        ("checkpoint_every", -1, "not be negative"),
    ],
)
def test_loop_config_names_bad_field(key, value, problem):
    with pytest.raises(UserError, match=f"^{key}={value} must {problem}"):
        LoopConfig(**{key: value})


@pytest.mark.parametrize("lengths", [(0, 0), (5, 100), (-1, 0), (0, -1)])
def test_loop_config_needs_exactly_one_length(lengths):
    with pytest.raises(UserError, match=r"^total_(steps|tokens)="):
        LoopConfig(total_steps=lengths[0], total_tokens=lengths[1])


def test_total_tokens_rounds_up_to_steps():
    config = LoopConfig(total_steps=0, total_tokens=1001)
    assert config.with_total_steps(100).total_steps == 11
    assert LoopConfig(total_steps=7).with_total_steps(100).total_steps == 7
    with pytest.raises(UserError, match="total_tokens=1001, but the task has no tokens"):
        config.with_total_steps(0)


if __name__ == "__main__":  # run by test_sigterm_exits_75_and_run_resumes
    jax.config.update("jax_num_cpu_devices", 8)
    flags = cli.Flags(__doc__)
    flags.string("workdir", None, "run directory", required=True)
    run = lambda args: train(args.workdir, total=40, read=stopping_at(20), checkpoint_every=0)  # noqa: E731
    cli.exit_process(flags.run(run))
