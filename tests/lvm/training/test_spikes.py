"""Loss-spike recovery: the run equals one that never had the skipped batches."""

import gc
import json
import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import DivergedError, UserError
from lvm.training import metrics
from lvm.training.checkpoint import Checkpoints
from lvm.training.local_checkpoint import LocalCheckpointConfig
from lvm.training.spikes import FILENAME, SkippedBatches, SpikeConfig, SpikeDetector, SpikeError
from tests.lvm.training.test_loop import bits, read_batch, release, stopping_at, timeless, train

SPIKE = SpikeConfig(deviations=8.0, window=4, skip_before=1)
ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=8)


def spiking_at(*numbers, read=read_batch):
    """Reads batches, with outlier targets in those numbered."""

    def spiked(number):
        batch = read(number)
        return {**batch, "y": batch["y"] + np.float32(1e4 if number in numbers else 0)}

    return spiked


@given(ranges)
def test_batch_index_skips_ranges_in_order(ranges):
    skipped = SkippedBatches()
    for first, more in ranges:
        skipped.add(first, first + more)
    skipped_indices = {number for first, more in ranges for number in range(first, first + more + 1)}
    expected = [number for number in range(300) if number not in skipped_indices][:100]
    assert [skipped.batch_index(step) for step in range(100)] == expected
    assert skipped.rewinds == len(ranges)


def test_skipped_batches_round_trip(tmp_path):
    assert SkippedBatches.load(tmp_path).ranges == []
    skipped = SkippedBatches()
    skipped.add(7, 9)
    skipped.save(tmp_path)
    again = SkippedBatches.load(tmp_path)
    assert (again.rewinds, again.ranges) == (1, [(7, 9)])
    (tmp_path / FILENAME).write_text("[3]")
    with pytest.raises(UserError, match=f"{FILENAME}: not a record of skipped batches"):
        SkippedBatches.load(tmp_path)


def test_detector_needs_full_window():
    early = SpikeDetector(SpikeConfig(deviations=3.0, window=4))
    for step, loss in enumerate([2.0, 2.1, 2.0, 9.0]):
        early.update(step, loss)
    watch = SpikeDetector(SpikeConfig(deviations=3.0, window=4))
    for step, loss in enumerate([90.0, 2.0, 2.2, 1.9, 2.1]):
        watch.update(step, loss)  # the first precedes the window and leaves it with the fifth
    with pytest.raises(SpikeError, match=r"step 9: the loss of 9\.0000 is a spike \(mean: 2\.05"):
        SpikeDetector(SpikeConfig(deviations=3.0, window=4), watch.losses).update(9, 9.0)
    SpikeDetector(SpikeConfig(window=4), watch.losses).update(9, 9.0)  # detection is off


def test_rewound_run_equals_run_without_batches(tmp_path, caplog):
    spiked = train(tmp_path / "spiked", total=12, read=spiking_at(8), spike=SPIKE)
    log = caplog.text
    assert "step 9: the loss of" in log
    assert "skipping batches 7 to 8, rewind 1" in log
    assert "resuming from step 6" in log
    without = train(tmp_path / "without", total=12, read=lambda n: read_batch(n if n < 7 else n + 2), spike=SPIKE)
    assert bits(spiked) == bits(without)
    assert timeless(tmp_path / "spiked") == timeless(tmp_path / "without")
    assert json.loads((tmp_path / "spiked" / FILENAME).read_text()) == {"rewinds": 1, "batches": [[7, 8]]}


def test_resumed_run_still_skips_batches(tmp_path):
    whole = train(tmp_path / "whole", total=12, read=spiking_at(8), spike=SPIKE)
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", total=12, read=stopping_at(11, spiking_at(8)), spike=SPIKE)
    release(tmp_path / "cut")
    assert bits(train(tmp_path / "cut", total=12, read=spiking_at(8), spike=SPIKE)) == bits(whole)


def test_resumed_run_detects_same_spike(tmp_path, caplog):
    with pytest.raises(SystemExit):
        train(tmp_path, total=12, read=stopping_at(7, spiking_at(8)), spike=SPIKE)
    release(tmp_path)
    train(tmp_path, total=12, read=spiking_at(8), spike=SPIKE)
    assert "skipping batches 7 to 8, rewind 1" in caplog.text


@pytest.mark.parametrize(("checkpoint_every", "kept"), [(0, 0), (2, 6)])
def test_rewind_falls_back_to_earliest_checkpoint(tmp_path, caplog, checkpoint_every, kept):
    spike = SpikeConfig(deviations=8.0, window=4, skip_before=6)
    caplog.set_level("INFO")
    local = LocalCheckpointConfig(str(tmp_path / "local"), every=1)  # later ones than the one kept are not restored
    options = {"checkpoint_every": checkpoint_every, "local_checkpoint": local}
    train(tmp_path, total=10, read=spiking_at(8), spike=spike, **options)
    assert f"skipping batches {max(kept, 2)} to 8" in caplog.text
    assert re.findall(r"resuming from step (\d+)", caplog.text) == ([str(kept)] if kept else [])
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == list(range(1, 11))
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.all_steps()[-1] == 10
    checkpoints.close()


def test_rewind_frees_state_before_restore(tmp_path, monkeypatch):
    def kernels():
        return sum(x.shape == (8,) and x.sharding.mesh.size == 8 for x in jax.live_arrays() if on_a_mesh(x))

    counts = []
    restore = Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", lambda *args: counts.append(kernels()) or restore(*args))
    gc.collect()
    before = kernels()
    train(tmp_path, total=10, read=spiking_at(8), spike=SPIKE)
    assert counts == [before]


def on_a_mesh(array):
    return not array.is_deleted() and isinstance(array.sharding, jax.sharding.NamedSharding)


def test_rewind_limit_ends_run_and_names_batch(tmp_path):
    spike = SpikeConfig(deviations=8.0, window=4, skip_before=0, max_rewinds=1)
    with pytest.raises(DivergedError, match=r"step 10: the loss of .* is a spike .*, and the rewind limit"):
        train(tmp_path, total=99, read=spiking_at(8, 10), spike=spike)
    assert list(json.loads((tmp_path / "diverged.json").read_text())["batches"]) == ["10"]


@pytest.mark.parametrize(
    ("key", "value"), [("deviations", -1.0), ("window", 1), ("skip_before", -1), ("max_rewinds", -2)]
)
def test_spike_config_names_bad_field(key, value):
    with pytest.raises(UserError, match=f"^{key}={value} must"):
        SpikeConfig(**{key: value})
