"""Training as a command: on meshes of eight devices, with the options that a run is set up with."""

import pytest
from etils import epath

from lvm.training import metrics
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


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(demo, tmp_path):
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
    assert "attention by xla" in first.splitlines()[0]
    second = run("lvm.train", *shared, *OTHER_MESH, "--config.loop.total_steps=40", devices=8)
    assert "resuming from step 30" in second
    assert "resuming with a changed config.model.remat: 'auto' → 'full'" in second
    losses = [line["loss"] for line in metrics.read_metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_changed_mixture_must_be_accepted(demo, tmp_path):
    shared = [TINY, f"--config.data.store={demo / 'store'}", f"--workdir={tmp_path / 'run'}"]
    run("lvm.train", *shared, "--config.loop.total_steps=10")
    changed = [*shared, "--config.loop.total_steps=20", "--config.data.packing=whole"]
    refused = run("lvm.train", *changed, code=2)
    assert "config.data.packing: 'concat' → 'whole'" in refused
    accepted = run(
        "lvm.train", *changed, "--config.accept_changed_mixture=true", "--config.loop.input_workers=1"
    )
    assert "resuming with a changed config.data.packing: 'concat' → 'whole'" in accepted
    assert "resuming from step 10" in accepted
    assert "20/20 steps" in accepted


@pytest.mark.slow
def test_a_run_lives_on_gs(demo, gcs):
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
    there = epath.Path(f"{gcs}/runs/one")
    assert [line["step"] for line in metrics.read_metrics(there)] == [10, 20, 30, 40]
    assert (there / "checkpoints" / "40" / "commit_success.txt").exists()
    assert list((there / "pictures").glob("*-0000040.png"))
    assert list((there / "tensorboard").glob("events.*"))
    assert any(name.endswith(".xplane.pb") for _, _, names in (there / "profile").walk() for name in names)
    assert not (there / ".lease").exists()
    newest = next(path for path in (there / "checkpoints" / "40" / "params" / "d").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    output = run("lvm.train", *options, "--config.loop.total_steps=50")
    assert "damaged checkpoint: gs://bucket/runs/one/checkpoints/40/params/d/" in output
    assert "going back to step 20" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
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
def test_what_can_not_run_is_one_clear_line(demo, tmp_path, arguments, words):
    store = f"--config.data.store={demo / 'store'}"
    assert words in run("lvm.train", TINY, store, f"--workdir={tmp_path}", *arguments, code=2, devices=8)
