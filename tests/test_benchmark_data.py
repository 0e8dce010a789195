"""The benchmark of the input runs whole on small stores and prints its figures."""

from tests.commands import run


def test_benchmark_data_prints_every_figure(tmp_path):
    small = ("--scenes=0.003", "--seconds=0.2", "--batch_size=2", "--workers=0", f"--folder={tmp_path}")
    output = run("scripts.benchmark_data", *small)
    for packing in ("concat", "whole"):
        for shuffle in ("all", "blocks"):
            assert f"{packing}, shuffle {shuffle}, 0 workers, context 4096, 2 rows: " in output
    assert "first batch at step 1000000: " in output
    assert "× LVM's loader" in output
    assert "MiB resident over 10,000 sentences" in output
    assert not list(tmp_path.iterdir())


def test_benchmark_data_rejects_bad_numbers():
    assert "must be positive" in run("scripts.benchmark_data", "--batch_size=0", code=2)
