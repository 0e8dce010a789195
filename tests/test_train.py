"""The training command: meshes of eight devices, resumes, gs:// and refused settings."""

import pytest
from etils import epath

from lvm import train
from lvm.common import cli, distributed
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.training import metrics
from lvm.training.config import TrainConfig
from tests.commands import run

TINY = "--config=tests/configs/tiny_lvm.py"
MESH = [
    "--config.mesh.data=2",
    "--config.mesh.fsdp=2",
    "--config.mesh.sequence=2",
    "--config.mesh.zero1=true",
]
OTHER_MESH = [
    "--config.mesh.data=1",
    "--config.mesh.fsdp=4",
    "--config.mesh.tensor=2",
    "--config.model.remat=full",
]


def test_schedule_that_cannot_be_is_refused_before_processes_join(monkeypatch, tmp_path):
    config = from_config_dict(TrainConfig, cli.read_config([TINY, "--config.optimizer.warmup_steps=1000000"]))
    monkeypatch.setattr(distributed, "join", lambda config: pytest.fail("joined"))
    with pytest.raises(UserError, match="warmup_steps=1000000 must be below total_steps"):
        train.train(config, str(tmp_path / "run"))


@pytest.mark.slow
def test_train_resumes_on_other_mesh(demo, tmp_path):
    shared = [
        TINY,
        f"--config.data.store={demo / 'store'}",
        f"--workdir={tmp_path / 'run'}",
        "--config.batch_size=8",
    ]
    shared += [
        "--config.optimizer.name=lion",
        "--config.optimizer.schedule=wsd",
        "--config.objective.z_loss=1e-4",
    ]
    shared += ["--config.optimizer.decay_tokens=10000"]
    first = run(
        "lvm.train",
        *shared,
        *MESH,
        "--config.model.remat=auto",
        "--config.objective.accumulate_steps=2",
        "--config.loop.total_steps=30",
        devices=8,
    )
    assert "remat none: 0." in first
    assert "xla attention" in first
    second = run("lvm.train", *shared, *OTHER_MESH, "--config.loop.total_steps=40", devices=8)
    assert "resuming from step 30" in second
    assert "resuming with a changed config.model.remat: 'auto' → 'full'" in second
    losses = [line["loss"] for line in metrics.read_metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_train_refuses_changed_mixture_unless_accepted(demo, tmp_path):
    shared = [TINY, f"--config.data.store={demo / 'store'}", f"--workdir={tmp_path / 'run'}"]
    run("lvm.train", *shared, "--config.loop.total_steps=10")
    changed = [*shared, "--config.loop.total_steps=20", "--config.data.packing=whole"]
    refused = run("lvm.train", *changed, code=2)
    assert "config.data.packing: 'concat' → 'whole'" in refused
    accepted = run("lvm.train", *changed, "--config.accept_changed_mixture=true", "--config.loop.input_workers=1")
    assert "resuming with a changed config.data.packing: 'concat' → 'whole'" in accepted
    assert "resuming from step 10" in accepted
    assert "20/20 steps" in accepted


@pytest.mark.slow
def test_train_in_workdir_on_gs(demo, gcs):
    options = [TINY, f"--config.data.store={demo / 'store'}", f"--workdir={gcs}/runs/one"]
    options += [
        f"--config.tokenizer={demo / 'tokenizer'}",
        "--config.loop.profile=(3,4)",
        f"--config.loop.compilation_cache={gcs}/cache",
    ]
    run("lvm.train", *options, "--config.loop.total_steps=20")
    output = run("lvm.train", *options, "--config.loop.total_steps=40")
    assert "gs://bucket/runs/one: resuming from step 20" in output
    assert "compiled program found in the cache" in output
    workdir = epath.Path(f"{gcs}/runs/one")
    assert [line["step"] for line in metrics.read_metrics(workdir)] == [10, 20, 30, 40]
    assert (workdir / "checkpoints" / "40" / "commit_success.txt").exists()
    assert list((workdir / "pictures").glob("*-0000040.png"))
    assert list((workdir / "tensorboard").glob("events.*"))
    assert any(name.endswith(".xplane.pb") for _, _, names in (workdir / "profile").walk() for name in names)
    assert not (workdir / ".lease").exists()
    shard = next(path for path in (workdir / "checkpoints" / "40" / "params" / "d").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    output = run("lvm.train", *options, "--config.loop.total_steps=50")
    assert "damaged checkpoint: gs://bucket/runs/one/checkpoints/40/params/d/" in output
    assert "going back to step 20" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.mesh.data=8"],
            "config.batch_size: 2 is not divisible by data × fsdp × accumulate_steps = 8 × 1 × 1",
        ),
        (["--config.mesh.data=1", "--config.mesh.tensor=8"], "has dimension 2, not divisible by 8"),
        (
            ["--config.mesh.data=1", "--config.mesh.sequence=8"],
            "sequence: 8 doesn't divide the context of 98",
        ),
        (["--config.mesh.data=3"], "config.mesh: 3 × 1 × 1 × 1 = 3 devices, but there are 8"),
        (["--config.model.attention=splash"], "attention=splash needs a TPU, this is cpu"),
        (
            ["--config.optimizer.name=sgd"],
            "config.optimizer.name='sgd' must be one of adamw, lion, adafactor, muon",
        ),
    ],
)
def test_train_refuses_impossible_settings(demo, tmp_path, arguments, message):
    store = f"--config.data.store={demo / 'store'}"
    assert message in run("lvm.train", TINY, store, f"--workdir={tmp_path}", *arguments, code=2, devices=8)
