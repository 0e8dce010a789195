"""`lvm sweep fit` as a command: on a table, on a sweep's folder, and on nonsense."""

import dataclasses
import json

import numpy as np
import pytest

from lvm.scaling.laws import ChinchillaLaw
from tests.commands import run
from tests.lvm.sweeps import CHINCHILLA_CSV, isoflop_rows, needs_chinchilla_csv, write_csv, write_manifest, write_sweep

LAW = ChinchillaLaw(1.7, 400.0, 2000.0, 0.34, 0.36)
QUICK = ("--method=variable_projection", "--bootstrap=5")


def test_fit_of_a_table_writes_results(tmp_path):
    path = write_csv(tmp_path / "runs.csv", isoflop_rows(LAW, sizes=6))
    out = tmp_path / "out"
    text = run("lvm.sweep", "fit", f"--csv={path}", f"--out={out}", *QUICK, "--max_flops=5e20", f"--baseline={path}")
    fit = json.loads((out / "fit.json").read_text())
    assert (fit["rows"], fit["method"], fit["mask"]["max_flops"]) == (24, "variable_projection", 5e20)
    assert fit["parametric"]["alpha"] == pytest.approx(LAW.alpha, rel=1e-5)
    assert fit["speedup"][0]["speedup"] == pytest.approx(1, rel=1e-4)
    assert (out / "index.html").read_text().startswith("<!doctype html>")
    assert "alpha" in text
    assert "(extrapolated)" in text


def test_fit_of_a_sweep_warns_of_an_empty_budget(tmp_path):
    runs = write_sweep(tmp_path / "sweep", isoflop_rows(LAW, sizes=6))
    for entry in runs[:6]:
        (tmp_path / "sweep" / entry["workdir"] / "failure.json").write_text('{"reason": "out of memory"}')
    write_manifest(tmp_path / "sweep", runs)
    text = run("lvm.sweep", "fit", f"--sweep={tmp_path / 'sweep'}", f"--out={tmp_path / 'out'}", *QUICK)
    fit = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert fit["rows"] == 24
    assert fit["mask"]["excluded"]["run-0"] == "failed: out of memory"
    (warning,) = [line for line in text.splitlines() if "none of its 6 runs is finished" in line]
    assert "1e+17" in warning


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--csv or --sweep"),
        (["--csv=CSV", "--sweep=x"], "--csv or --sweep"),
        (["--csv=none.csv"], "none.csv: no such file"),
        (["--sweep=nowhere"], "no sweep.json"),
        (["--csv=CSV", "--drop_highest=14"], "4 rows can't determine 5 parameters"),
        (["--csv=CSV", "--drop_highest=99"], "leave none of 18 rows"),
        (["--csv=CSV", "--min_flops=1e19"], "one compute budget"),
        (["--csv=CSV", "--columns=loss=size"], "--columns=loss=size"),
        (["--csv=CSV", "--columns=loss"], "expected NAME=VALUE"),
        (["--csv=CSV", "--pin=E=high"], "--pin=E=high"),
        (["--csv=CSV", "--budgets=1e20,big"], "--budgets=big"),
        (["--csv=CSV", "--points=curve"], "--points"),
        (["--csv=CSV", "--method=cubic"], "method"),
        (["--csv=CSV", "--method=variable_projection", "--delta=7"], "--delta: has no effect on squared residuals"),
        (["--sweep=nowhere", "--columns=params=n"], "--columns: has no effect on a sweep"),
    ],
)
def test_fit_rejects_nonsense_in_one_line(tmp_path, capsys, arguments, words):
    from lvm import sweep

    path = write_csv(tmp_path / "runs.csv", isoflop_rows(LAW, [1e17, 1e18, 1e19], sizes=6))
    flags = [argument.replace("CSV", str(path)) for argument in arguments]
    assert sweep.main(["fit", *flags, f"--out={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "loss",
    [
        lambda N, D: 2 + 400 * N**-0.34,
        lambda N, D: 2 + 1e-9 * (N * D) ** 0.3,
        lambda N, D: np.random.default_rng(0).uniform(2, 3, len(N)),
    ],
    ids=["of params alone", "rising", "random"],
)
@pytest.mark.parametrize("method", ["huber", "variable_projection"])
def test_fit_of_losses_without_optimum_is_one_line(tmp_path, capsys, loss, method):
    from lvm import sweep

    rows = isoflop_rows(LAW, [1e17, 1e18, 1e19, 1e20], sizes=5)
    path = write_csv(tmp_path / "runs.csv", dataclasses.replace(rows, loss=loss(rows.params, rows.tokens)))
    flags = [f"--method={method}", "--inits=6", "--bootstrap=0", f"--out={tmp_path / 'out'}"]
    code, error = sweep.main(["fit", f"--csv={path}", *flags]), capsys.readouterr().err
    assert code == 0 or (code == 2 and "do not determine a law" in error.splitlines()[-1])
    assert (tmp_path / "out" / "fit.json").exists() == (code == 0)


@pytest.mark.parametrize("verb", ["", "fits"])
def test_sweep_rejects_an_unknown_verb(capsys, verb):
    from lvm import sweep

    assert sweep.main([verb] if verb else []) == 2
    assert "expected plan, run, status, fit" in capsys.readouterr().err


@pytest.mark.alone
@needs_chinchilla_csv
def test_fit_of_chinchilla_csv_from_all_starts(tmp_path):
    run("lvm.sweep", "fit", f"--csv={CHINCHILLA_CSV}", "--drop_highest=5", f"--out={tmp_path / 'out'}")
    parametric = json.loads((tmp_path / "out" / "fit.json").read_text())["parametric"]
    assert parametric["inits"] == 4500
    assert parametric["objective"] <= 1.01830e-3
    # The bootstrap of arXiv 2404.10102.
    assert parametric["interval"]["E"] == pytest.approx([1.769, 1.871], abs=0.02)
    assert parametric["interval"]["alpha"] == pytest.approx([0.317, 0.373], abs=0.01)
    assert parametric["interval"]["beta"] == pytest.approx([0.331, 0.415], abs=0.015)
