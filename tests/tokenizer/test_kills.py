"""A tokenizer's run killed around its discriminator's first step has the bits of an unbroken one."""

import random

import pytest

from tests.commands import run, start
from tests.test_kills import kill_after, saved

STEPS, START = 24, 12
OPTIONS = [
    "--config=tests/configs/tiny_tokenizer.py", "--config.ema_decay=0.9", "--config.adversarial.weight=0.1",
    "--config.adversarial.adaptive=true", f"--config.adversarial.start_step={START}", "--config.adversarial.lecam=0.01",
    "--config.adversarial.feature_matching=0.1", "--config.adversarial.discriminator.channels=8",
    "--config.adversarial.discriminator.stages=2", "--config.adversarial.discriminator.norm_groups=4",
    "--config.adversarial.optimizer.warmup_steps=2", "--config.loss.perceptual.kind=ms_ssim",
    f"--config.loop.total_steps={STEPS}", "--config.loop.checkpoint_every=4", "--config.loop.log_every=1",
    "--config.loop.evaluate_every=0", "--config.loop.picture_every=0",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 5])
def test_killed_tokenizer_run_has_bits_of_unbroken_run(tmp_path, kills):
    run("tokenizer.train", *OPTIONS, f"--workdir={tmp_path / 'whole'}")
    rng, at = random.Random(kills), 0
    for attempt in range(kills):
        # Each attempt resumes at the checkpoint before the last kill and is killed a few steps further on.
        steps = START + rng.randint(-2, 4) if attempt == 0 else rng.randint(1, 6)
        process = start("tokenizer.train", *OPTIONS, f"--workdir={tmp_path / 'killed'}", start_new_session=True)
        if not kill_after(process, steps):
            break
        at += 1
    assert at > kills // 2
    assert f"{STEPS}/{STEPS} steps" in run("tokenizer.train", *OPTIONS, f"--workdir={tmp_path / 'killed'}")
    whole, resumed = saved(tmp_path / "whole", STEPS), saved(tmp_path / "killed", STEPS)
    assert whole.keys() == resumed.keys()
    assert any("discriminator" in path for path in whole)
    for path, array in whole.items():
        assert array.tobytes() == resumed[path].tobytes(), path
