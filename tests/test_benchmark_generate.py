"""The benchmark of generation: the whole command on a tiny size, and what it counts."""

import dataclasses
import importlib.util

import pytest

from lvm.model.transformer import SIZES
from scripts.benchmark_generate import traffic, verdicts
from tests.commands import run

TINY = ("--size=debug", "--cached=16", "--tokens=8", "--repeats=1", "--batch_sizes=1", "--caches=dynamic")


@pytest.mark.slow
def test_benchmark_generate_prints_both_contenders():
    output = run("scripts.benchmark_generate", *TINY)
    assert "ours, cache of fixed size" in output
    assert "debug in float32, 16 tokens cached, then 8 generated" in output
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        assert f"transformers: {missing[0]} isn't installed" in output
        assert "1 rows: nothing to compare" in output
    else:
        assert "transformers, dynamic cache" in output
        assert "× the fastest of transformers" in output


def test_benchmark_generate_fails_without_our_figure():
    assert "stopped after its 0 s" in run("scripts.benchmark_generate", *TINY, "--minutes=0", code=1)


def test_benchmark_generate_rejects_unknown_size():
    assert "--size: 'huge' is not one of debug" in run("scripts.benchmark_generate", "--size=huge", code=2)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_traffic_counts_weights_and_caches(dtype, size):
    config = dataclasses.replace(SIZES["debug"], vocabulary_size=8292, dtype=dtype)
    weights = 2_450_000  # of the published table, rounded
    read = traffic(config, rows=3, cached=100)
    cache = 3 * 100 * 2 * 2 * 128 * size
    assert (read - cache) / size == pytest.approx(weights - 8292 * 128, rel=0.01)


def test_verdicts_use_fastest_peer():
    def record(contender, milliseconds, answer):
        return {
            "contender": contender,
            "rows": 1,
            "milliseconds": milliseconds,
            "best": milliseconds / 2,
            "answer": answer,
        }

    records = [record("ours", 2.0, [[1, 2]]), record("peer", 6.0, [[1, 2]]), record("peer", 4.0, [[1, 3]])]
    (line,) = verdicts(records)
    assert "2.00 × the fastest" in line
    assert "75.0% of the tokens are the same" in line
