"""Around a spike of the loss: the same run as one that never had those batches."""

import gc
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import DivergedError, UserError
from lvm.training import metrics
from lvm.training.checkpoint import Checkpoints
from lvm.training.spikes import FILENAME, SkippedBatches, SpikeConfig, SpikeDetector, SpikeError
from tests.lvm.training.test_loop import bits, read_batch, release, stopping_at, timeless, train

SPIKE = SpikeConfig(deviations=8.0, window=4, skip_before=1)
stretches = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=8)


def spiking_at(*numbers, read=read_batch):
    """Batches, of which those have targets that nobody could foresee."""

    def spiked(number):
        batch = read(number)
        return {**batch, "y": batch["y"] + np.float32(1e4 if number in numbers else 0)}

    return spiked


@given(stretches)
def test_batches_come_in_order_and_none_that_is_left_out(found):
    left_out = SkippedBatches()
    for first, more in found:
        left_out.add(first, first + more)
    gone = {number for first, more in found for number in range(first, first + more + 1)}
    wanted = [number for number in range(300) if number not in gone][:100]
    assert [left_out.batch_index(step) for step in range(100)] == wanted
    assert left_out.rewinds == len(found)


def test_what_is_left_out_is_kept_in_the_workdir(tmp_path):
    assert SkippedBatches.load(tmp_path).ranges == []
    left_out = SkippedBatches()
    left_out.add(7, 9)
    left_out.save(tmp_path)
    again = SkippedBatches.load(tmp_path)
    assert (again.rewinds, again.ranges) == (1, [(7, 9)])
    (tmp_path / FILENAME).write_text("[3]")
    with pytest.raises(UserError, match=f"{FILENAME}: not a list of batches"):
        SkippedBatches.load(tmp_path)


def test_only_a_full_window_knows_a_spike():
    watch = SpikeDetector(SpikeConfig(deviations=3.0, window=4))
    for step, loss in enumerate([90.0, 2.0, 2.2, 1.9, 2.1]):
        watch.update(step, loss)  # the first is no spike, and leaves the window with the fifth
    with pytest.raises(SpikeError, match=r"step 9: the loss of 9\.0000 is a spike \(mean: 2\.05"):
        SpikeDetector(SpikeConfig(deviations=3.0, window=4), watch.recent_losses).update(9, 9.0)
    SpikeDetector(SpikeConfig(window=4), watch.recent_losses).update(9, 9.0)  # nobody asked


def test_a_run_goes_around_a_spike_and_is_the_run_that_never_met_it(tmp_path, caplog):
    spiked = train(tmp_path / "spiked", total=12, read=spiking_at(8), spike=SPIKE)
    said = caplog.text
    assert "step 9: the loss of" in said
    assert "batches 7 to 8 are left out, rewind 1" in said
    assert "going on from step 6" in said
    without = train(
        tmp_path / "without", total=12, read=lambda n: read_batch(n if n < 7 else n + 2), spike=SPIKE
    )
    assert bits(spiked) == bits(without)
    assert timeless(tmp_path / "spiked") == timeless(tmp_path / "without")
    assert json.loads((tmp_path / "spiked" / FILENAME).read_text()) == {"rewinds": 1, "batches": [[7, 8]]}


def test_a_run_cut_off_after_a_spike_still_leaves_its_batches_out(tmp_path):
    whole = train(tmp_path / "whole", total=12, read=spiking_at(8), spike=SPIKE)
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", total=12, read=stopping_at(11, spiking_at(8)), spike=SPIKE)
    release(tmp_path / "cut")
    assert bits(train(tmp_path / "cut", total=12, read=spiking_at(8), spike=SPIKE)) == bits(whole)


def test_a_resumed_run_sees_the_spike_that_an_unbroken_one_sees(tmp_path, caplog):
    with pytest.raises(SystemExit):
        train(tmp_path, total=12, read=stopping_at(7, spiking_at(8)), spike=SPIKE)
    release(tmp_path)
    train(tmp_path, total=12, read=spiking_at(8), spike=SPIKE)
    assert "batches 7 to 8 are left out, rewind 1" in caplog.text


@pytest.mark.parametrize(("checkpoint_every", "kept"), [(0, 0), (2, 6)])
def test_with_no_checkpoint_early_enough_it_goes_back_as_far_as_it_can(
    tmp_path, caplog, checkpoint_every, kept
):
    spike = SpikeConfig(deviations=8.0, window=4, skip_before=6)
    train(tmp_path, total=10, read=spiking_at(8), spike=spike, checkpoint_every=checkpoint_every)
    assert f"batches {max(kept, 2)} to 8 are left out" in caplog.text
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == list(range(1, 11))
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.all_steps()[-1] == 10
    checkpoints.close()


def test_the_state_of_a_spike_is_gone_before_another_is_read(tmp_path, monkeypatch):
    def kernels():
        return sum(x.shape == (8,) and x.sharding.mesh.size == 8 for x in jax.live_arrays() if on_a_mesh(x))

    found = []
    restore = Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", lambda *given: found.append(kernels()) or restore(*given))
    gc.collect()
    before = kernels()
    train(tmp_path, total=10, read=spiking_at(8), spike=SPIKE)
    assert found == [before]


def on_a_mesh(array):
    return not array.is_deleted() and isinstance(array.sharding, jax.sharding.NamedSharding)


def test_too_many_spikes_end_the_run_and_name_the_last_ones_batch(tmp_path):
    spike = SpikeConfig(deviations=8.0, window=4, skip_before=0, max_rewinds=1)
    with pytest.raises(DivergedError, match=r"step 10: the loss of .* is a spike .*, and 1 were gone around"):
        train(tmp_path, total=99, read=spiking_at(8, 10), spike=spike)
    assert list(json.loads((tmp_path / "diverged.json").read_text())["batches"]) == ["10"]


@pytest.mark.parametrize(
    ("key", "value"), [("deviations", -1.0), ("window", 1), ("skip_before", -1), ("max_rewinds", -2)]
)
def test_impossible_limits_are_refused_by_key(key, value):
    with pytest.raises(UserError, match=f"^{key}: {value} "):
        SpikeConfig(**{key: value})
