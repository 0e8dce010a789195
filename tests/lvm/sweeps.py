"""Generated observations of sweeps, and sweeps of finished runs."""

import json
import pathlib

import numpy as np
import pytest

from lvm.scaling.laws import ChinchillaLaw, Law
from lvm.scaling.observations import Observations

ASYMMETRIC = ChinchillaLaw(1.69, 406.4, 410.7, 0.465, 0.155)
BUDGETS = np.geomspace(1e17, 1e21, 5)
CHINCHILLA_CSV = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "chinchilla.csv"
needs_chinchilla_csv = pytest.mark.skipif(not CHINCHILLA_CSV.exists(), reason=f"{CHINCHILLA_CSV} is absent")


def make_rows(params, tokens, loss) -> Observations:
    """Rows with C = 6·N·D, each a run."""
    numbers = np.arange(len(loss))
    return Observations(params, tokens, 6 * params * tokens, loss, numbers.astype(str), numbers)


def isoflop_rows(
    law: Law = ASYMMETRIC, budgets=BUDGETS, sizes=15, width=4.0, centers=1.0, noise=0.0, seed=0
) -> Observations:
    """Sizes from N*·center / width to N*·center · width of each budget, with log-normal noise of the loss."""
    optima = np.array([law.optimum(flops).params for flops in budgets])
    factors = np.geomspace(1 / width, width, sizes)
    params = ((optima * centers)[:, None] * factors).ravel()
    tokens = np.repeat(budgets, sizes) / 6 / params
    deviations = np.random.default_rng(seed).normal(0, noise, len(params))
    return make_rows(params, tokens, law.loss(params, tokens) * np.exp(deviations))


def write_csv(path, rows: Observations, header="params,tokens,flops,loss") -> pathlib.Path:
    """A table with the columns of `rows`, its downstream metrics too."""
    columns = [rows.params, rows.tokens, rows.flops, rows.loss, *rows.metrics.values()]
    lines = [",".join([header, *rows.metrics])]
    lines += [",".join("" if np.isnan(x) else repr(float(x)) for x in line) for line in zip(*columns, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_sweep(folder, rows: Observations, steps=100) -> list[dict]:
    """A sweep's manifest and workdirs with metrics: held-out losses that fall to each row's; returns its runs."""
    runs = []
    for i in range(len(rows)):
        name = f"run-{i}"
        workdir = folder / name
        workdir.mkdir(parents=True)
        losses = {step: float(rows.loss[i]) * (1 + (steps - step) / (10 * steps)) for step in (steps // 2, steps)}
        lines = [{"step": step, "loss": 9.0, "heldout_loss": loss} for step, loss in losses.items()]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(
            {
                "name": name,
                "workdir": name,
                "params": float(rows.params[i]),
                "params_without_embedding": float(rows.params[i]) / 2,
                "tokens": float(rows.tokens[i]),
                "flops": float(rows.flops[i]),
                "steps": steps,
            }
        )
    write_manifest(folder, runs)
    return runs


def write_manifest(folder, runs) -> None:
    (folder / "sweep.json").write_text(json.dumps({"format": 1, "runs": runs}))
