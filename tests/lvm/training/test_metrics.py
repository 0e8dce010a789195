"""`metrics.jsonl` has each step once, after any interruption; Weights & Biases."""

import sys
import threading
import time
import types
import uuid
from unittest import mock

import numpy as np
import pytest
from etils import epath
from PIL import Image

from lvm.common import files
from lvm.common.errors import UserError
from lvm.training import metrics
from lvm.training.metrics import FILENAME, MetricsWriter


def write(folder, start, steps):
    with MetricsWriter(folder, start) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step})


def steps(folder):
    return [line["step"] for line in metrics.read_metrics(folder)]


def test_read_metrics_returns_lines_in_order(tmp_path):
    write(tmp_path, 0, [1, 2, 3])
    assert metrics.read_metrics(tmp_path) == [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]


def test_read_metrics_of_empty_folder_is_empty(tmp_path):
    assert metrics.read_metrics(tmp_path) == []


@pytest.mark.parametrize(("resumed", "kept"), [(0, []), (25, [10, 20]), (30, [10, 20, 30]), (99, [10, 20, 30])])
def test_writer_drops_lines_after_start(tmp_path, resumed, kept):
    write(tmp_path, 0, [10, 20, 30])
    write(tmp_path, resumed, [resumed + 10])
    assert steps(tmp_path) == [*kept, resumed + 10]


def test_writer_flushes_each_line(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, {"loss": 2.0})
        assert steps(tmp_path) == [1]


@pytest.mark.parametrize("rest", ['{"step": 30, "lo', '{"step": 30, "loss": 1.0}'])
def test_truncated_last_line_is_dropped(tmp_path, rest):
    write(tmp_path, 0, [10, 20])
    with open(tmp_path / FILENAME, "a") as file:
        file.write(rest)
    assert steps(tmp_path) == [10, 20]
    write(tmp_path, 20, [30])
    assert (tmp_path / FILENAME).read_text().count("\n") == 3
    assert steps(tmp_path) == [10, 20, 30]


def test_lines_that_are_no_metrics_are_named_and_dropped(tmp_path, caplog):
    good = b'{"step": 10, "loss": 1.0}'
    bad = [b"\0" * 20, b"", b"{", b"null", b'{"loss": 1.0}', b'{"step": null}', b"\xff\xfe"]
    (tmp_path / FILENAME).write_bytes(b"\n".join([good, *bad, good.replace(b"10", b"20"), b""]))
    assert steps(tmp_path) == [10, 20]
    assert [f"{FILENAME}:{number}:" in caplog.text for number in range(1, 10)] == [False, *[True] * 7, False]
    write(tmp_path, 20, [30])
    assert steps(tmp_path) == [10, 20, 30]
    assert (tmp_path / FILENAME).read_text().count("\n") == 3


@pytest.fixture
def bucket(gcs, monkeypatch):
    """A folder on object storage, without TensorBoard's own objects."""
    monkeypatch.setattr("tensorboardX.SummaryWriter", mock.MagicMock())
    return epath.Path(gcs) / uuid.uuid4().hex


def test_remote_metrics_are_parts_read_in_order(bucket, monkeypatch):
    monkeypatch.setattr(metrics, "_PART_BYTES", 50)  # two lines
    write(bucket, 0, range(10, 80, 10))
    parts = bucket / metrics.PARTS
    names = [f"{step:09d}.jsonl" for step in (10, 30, 50, 70)]
    assert sorted(path.name for path in parts.iterdir()) == names
    assert steps(bucket) == list(range(10, 80, 10))
    before = files.objects(parts)[names[0]]
    write(bucket, 40, [45])
    assert sorted(path.name for path in parts.iterdir()) == [*names[:2], "000000045.jsonl"]
    assert steps(bucket) == [10, 20, 30, 40, 45]
    write(bucket, 30, [31])
    assert steps(bucket) == [10, 20, 30, 31]
    assert files.objects(parts)[names[0]] == before
    write(bucket, 0, [1])
    assert steps(bucket) == [1]


def test_remote_metrics_in_one_file_are_continued(bucket):
    files.write_atomically(bucket / FILENAME, b'{"step": 10}\n{"step": 20}\n')
    write(bucket, 10, [11])
    assert steps(bucket) == [10, 11]


def test_parts_copied_to_a_disk_are_continued(tmp_path):
    (tmp_path / metrics.PARTS).mkdir()
    for step in (10, 20):
        (tmp_path / metrics.PARTS / f"{step:09d}.jsonl").write_text(f'{{"step": {step}}}\n')
    assert steps(tmp_path) == [10, 20]
    write(tmp_path, 20, [30])
    assert steps(tmp_path) == [10, 20, 30]


def test_remote_writes_never_block_the_caller(bucket, monkeypatch):
    released, written = threading.Event(), []

    def slow_write(path, data):
        released.wait()
        written.append((path.name, data))

    monkeypatch.setattr(files, "write_atomically", slow_write)
    writer = MetricsWriter(bucket, 0)
    for step in range(1, 101):
        writer.write(step, {"loss": 1.0})
        writer.write_file("goodput.json", {"step": step})
    released.set()
    writer.__exit__()
    # What was put meanwhile goes up at once.
    assert len(written) <= 4
    assert written[-1][1].count(b"\n") in (3, 100)
    assert dict(written)["000000001.jsonl"].count(b"\n") == 100
    assert dict(written)["goodput.json"] == files.json_bytes({"step": 100})


def test_upload_that_fails_is_tried_again(bucket, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "_RETRY_S", 0.01)
    attempts, original = [], files.write_atomically

    def failing_at_first(path, data):
        attempts.append(path)
        if len(attempts) < 3:
            raise OSError("503")
        original(path, data)

    monkeypatch.setattr(files, "write_atomically", failing_at_first)
    uploader = metrics.Uploader()
    uploader.put(bucket / "a", b"1")
    while len(attempts) < 3:
        time.sleep(0.01)
    uploader.close()
    assert (bucket / "a").read_bytes() == b"1"
    assert "a: not written, tried again: 503" in caplog.text


def test_upload_that_fails_at_the_end_is_an_error(bucket, monkeypatch):
    def fail(path, data):
        raise OSError("403")

    monkeypatch.setattr(files, "write_atomically", fail)
    uploader = metrics.Uploader()
    uploader.put(bucket / "a", b"1")
    with pytest.raises(OSError, match="403"):
        uploader.close()


class FakeWandb(types.ModuleType):
    """A stand-in for the wandb module that records its calls."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    Image = staticmethod(lambda pixels: ("image", pixels.shape))

    def init(self, **options):
        self.calls.append(options)
        if options["project"] == "secret":
            raise self.Error("permission denied")
        return self

    def define_metric(self, name, step_metric):
        self.calls.append((name, step_metric))

    def log(self, values):
        self.calls.append(values)

    def finish(self):
        self.calls.append("finished")


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_all_values_under_one_id(tmp_path, wandb):
    files.write_json(tmp_path / "config.json", {"config": {"seed": 3}})
    for start in (0, 1):
        with MetricsWriter(tmp_path, start, "team/vision") as writer:
            writer.write(start + 1, {"loss": 2.0})
            writer.write_pictures(start + 1, {"answers": np.zeros((4, 5, 3), np.uint8)})
    first, second = (options for options in wandb.calls if isinstance(options, dict) and "id" in options)
    assert first == second
    assert (first["entity"], first["project"], first["resume"]) == ("team", "vision", "allow")
    assert first["config"] == {"config": {"seed": 3}}
    assert first["name"] == tmp_path.name
    assert wandb.calls.count(("*", "step")) == wandb.calls.count("finished") == 2
    assert {"step": 2, "loss": 2.0} in wandb.calls
    assert {"step": 2, "answers": ("image", (4, 5, 3))} in wandb.calls


def test_pictures_are_written_to_files_and_tensorboard(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write_pictures(7, {"answers-video": picture})
    np.testing.assert_array_equal(Image.open(tmp_path / "pictures" / "answers-video-0000007.png"), picture)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"answers-video" in events.read_bytes()


def test_wandb_refused_or_missing_is_user_error(tmp_path, wandb, monkeypatch):
    files.write_json(tmp_path / "config.json", {})
    with pytest.raises(UserError, match=r"config\.loop\.wandb: secret: permission denied"):
        MetricsWriter(tmp_path, 0, "secret")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config\.loop\.wandb: vision: pip install wandb"):
        MetricsWriter(tmp_path, 0, "vision")
