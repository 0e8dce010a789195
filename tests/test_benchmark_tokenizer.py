"""The benchmark of the tokenizers: its table and its rules, without running networks of full size."""

import importlib.util

import numpy as np
import pytest

from scripts import benchmark_tokenizer
from tests.commands import run


def test_benchmark_tokenizer_rejects_unknown_network():
    output = run("scripts.benchmark_tokenizer", "--network=vqvae", code=2)
    assert "--network: 'vqvae' is not one of maskgit, lvm_old, lvm" in output


def test_benchmark_tokenizer_fails_without_our_figure():
    output = run("scripts.benchmark_tokenizer", "--network=maskgit", "--peer=none", "--minutes=0", code=1)
    assert "stopped after its 0 s" in output


def test_contenders_get_equal_inputs():
    job = {"network": "lvm", "batch_size": 2}
    images, codes = benchmark_tokenizer.random_images(job), benchmark_tokenizer.random_codes(job)
    assert (images.shape, images.dtype, codes.shape) == ((2, 256, 256, 3), np.uint8, (2, 256))
    np.testing.assert_array_equal(images, benchmark_tokenizer.random_images(job))
    assert 0 <= codes.min() < 100 < 8000 < codes.max() < 8192


def test_measure_takes_median_after_warmup(monkeypatch):
    clock = iter([0, 90, 100, 101, 200, 204, 300, 302])  # warm-up of 90 s, then 1, 4 and 2
    monkeypatch.setattr(benchmark_tokenizer.time, "perf_counter", lambda: next(clock))
    calls = []
    job = {"warmup": 1, "steps": 3, "batch_size": 8}
    row = benchmark_tokenizer.measure("eager", "encode", job, lambda: calls.append(1))
    assert len(calls) == 4
    assert (row["milliseconds"], row["images_per_second"]) == (2000, 4)


def test_table_compares_with_fastest_torch_row():
    def row(contender, work, rate, **more):
        return {
            "network": "lvm", "contender": contender, "work": work, "variant": more.pop("variant", ""),
            "batch_size": 4, "milliseconds": 4000 / rate, "images_per_second": rate, **more,
        }  # fmt: skip

    records = [
        row("ours", "encode", 6.0, operations=2e9),
        row("torch", "encode", 2.0, variant="eager"),
        row("torch", "encode", 4.0, variant="compiled"),
        row("ours", "decode", 1.0, operations=5e9),
        {"network": "lvm", "contender": "torch", "work": "decode", "failed": "out of memory"},
        {"network": "lvm", "contender": "ours", "work": "encode", "profile": ["kind  ms"]},
    ]
    lines = benchmark_tokenizer.table(records).splitlines()
    assert lines[1].split() == ["lvm", "ours", "encode", "4", "666.7", "6.00", "12", "1.50"]
    assert lines[3].split() == ["lvm", "torch,", "compiled", "encode", "4", "1000.0", "4.00", "8"]
    assert lines[4].split()[-2:] == ["1.00", "5"]
    assert lines[5].endswith("out of memory")
    assert lines[-2:] == ["lvm, our encode by kind of work:", "kind  ms"]


@pytest.mark.slow
def test_benchmark_tokenizer_prints_contenders_and_profile(tmp_path):
    output = run(
        "scripts.benchmark_tokenizer", "--network=maskgit", "--batch_size=1", "--steps=1", "--warmup=1",
        "--notorch_compile", f"--profile={tmp_path}", "--flips=1",
    )  # fmt: skip
    rows = [line.split() for line in output.splitlines() if line.startswith("maskgit  ")]
    assert [row[1:3] for row in rows[:2]] == [["ours", "encode"], ["ours", "decode"]]
    if importlib.util.find_spec("diffusers") is None:
        assert "isn't installed" in output
    else:
        assert [row[1] for row in rows[2:]] == ["torch,", "torch,"]
    assert "convolutions and products" in output
    assert "bfloat16 changes" in output
    assert list(tmp_path.rglob("*.trace.json.gz"))
