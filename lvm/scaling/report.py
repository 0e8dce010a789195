"""Results of an analysis: `fit.json` (schema in docs/scaling.md), a table for the terminal, and a page."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from lvm import __version__
from lvm.common import files
from lvm.common.page import Row, Section, render_page
from lvm.scaling import plots
from lvm.scaling.analysis import Allocation, Analysis
from lvm.scaling.observations import PERPLEXITY, SCORE
from lvm.scaling.parametric import log_residuals

FIT, PAGE = "fit.json", "index.html"
FORMAT = 1
_APPROACHES = {"parametric": "law", "isoflop": "IsoFLOP parabolas", "envelope": "envelope"}


def write_results(out: epath.PathLike, analysis: Analysis, source: str) -> None:
    """Writes the page and, last, `fit.json` into the folder `out`."""
    folder = epath.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    page = render_page(f"Scaling law of {source}", _intro(analysis), summary_table(analysis), _sections(analysis))
    files.write_atomically(folder / PAGE, page.encode())
    files.write_json(folder / FIT, to_json(analysis, source))


def to_json(analysis: Analysis, source: str) -> dict[str, Any]:
    """The content of `fit.json`; what is unknown or infinite is null."""
    fit, settings = analysis.fit, analysis.settings
    parametric = {
        **fit.coefficients,
        "params_exponent": fit.law.params_exponent,
        "objective": fit.objective,
        "inits": fit.inits,
        "share_of_inits": fit.share_of_inits,
        "interval": analysis.intervals,
        "units": dict(zip(("params", "tokens"), fit.units, strict=True)),
        "delta": None if settings.fit.method == "variable_projection" else settings.fit.delta,
        "overestimate_penalty": settings.fit.overestimate_penalty,
        "underestimate_penalty": settings.fit.underestimate_penalty,
        "pins": settings.fit.pins,
    }
    mask = {
        "drop_highest": settings.drop_highest,
        "min_flops": settings.min_flops,
        "max_flops": settings.max_flops,
        "max_residual": settings.max_residual,
        "excluded": analysis.observations.excluded,
    }
    approaches: dict[str, Any] = {
        name: {"params_exponent": value, "interval": interval}
        for name, (value, interval) in analysis.exponents.items()
        if name != "parametric"
    }
    if "isoflop" in approaches:
        approaches["isoflop"]["bias"] = list(analysis.bias)
    return _finite(
        {
            "format": FORMAT,
            "lvm_version": __version__,
            "source": source,
            "method": settings.fit.method,
            "rows": len(analysis.observations),
            "mask": mask,
            "flops_ratio": analysis.observations.flops_ratio,
            "parametric": parametric,
            **approaches,
            "parabolas": [dataclasses.asdict(parabola) for parabola in analysis.parabolas],
            "envelope_rows": analysis.envelope.name.tolist(),
            "bootstrap": {"draws": settings.bootstrap, "seed": settings.seed, "confidence": 0.95},
            "predictions": {
                name: [dataclasses.asdict(allocation) for allocation in allocations]
                for name, allocations in analysis.predictions.items()
            },
            "roll_out": [dataclasses.asdict(held_out) for held_out in analysis.held_out],
            "leave_largest_out": dataclasses.asdict(analysis.held_out[-1]) if analysis.held_out else None,
            "speedup": [dataclasses.asdict(speedup) for speedup in analysis.speedups],
            "warnings": list(analysis.warnings),
            "observations": _observations(analysis),
        }
    )


def _observations(analysis: Analysis) -> list[dict[str, Any]]:
    rows = analysis.observations
    predicted = rows.loss * _ratios(analysis)
    arrays = {"params": rows.params, "tokens": rows.tokens, "flops": rows.flops, "loss": rows.loss, **rows.metrics}
    return [
        {
            "name": str(name),
            **{key: float(values[i]) for key, values in arrays.items()},
            "predicted": float(predicted[i]),
        }
        for i, name in enumerate(rows.name)
    ]


def _ratios(analysis: Analysis) -> Any:
    """Predicted over observed loss of each row."""
    return math.e ** log_residuals(analysis.fit.law, analysis.observations)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary_table(analysis: Analysis) -> list[Row]:
    """Rows (name, value, meaning) for the page and the terminal."""
    fit, settings = analysis.fit, analysis.settings
    penalties = (settings.fit.overestimate_penalty, settings.fit.underestimate_penalty)
    weights = "" if penalties == (1, 1) else f"; overestimates × {penalties[0]:g}, underestimates × {penalties[1]:g}"
    is_squares = settings.fit.method == "variable_projection"
    rows = [
        (
            "method",
            settings.fit.method,
            "squared residuals" if is_squares else f"delta {settings.fit.delta:g}{weights}",
        ),
        ("rows", str(len(analysis.observations)), f"{len(analysis.observations.excluded)} left out: {_mask(analysis)}"),
        ("objective", f"{fit.objective:.6g}", f"{fit.share_of_inits:.0%} of {fit.inits} starts reach it"),
    ]
    units = "" if fit.units == (1.0, 1.0) else f"of N / {fit.units[0]:g} and D / {fit.units[1]:g}"
    for name, value in fit.coefficients.items():
        meaning = "pinned" if name in settings.fit.pins else _describe(analysis.intervals.get(name))
        rows.append((name, f"{value:.6g}", ", ".join(filter(None, [meaning, units if name in "AB" else ""]))))
    for name, (value, interval) in analysis.exponents.items():
        rows.append((f"a, {_APPROACHES[name]}", f"{value:.4g}", f"N* ∝ C^a; {_describe(interval)}"))
    for allocation in analysis.predictions["parametric"]:
        rows += _prediction_rows(allocation)
    if analysis.held_out and not (last := analysis.held_out[-1]).problem:
        meaning = f"mean error of {last.rows} rows at {last.flops:.3g} FLOPs, fitted to {last.fitted_rows} of less"
        rows.append(
            ("largest budget left out", f"{last.mean_error:+.2%}", f"{meaning}; lowest loss {last.best_error:+.2%}")
        )
    for speedup in analysis.speedups:
        factor = f"{speedup.speedup:.3g} ×" if math.isfinite(speedup.speedup) else "never reached"
        name = f"effective speedup at {speedup.flops:.3g} FLOPs"
        rows.append((name, factor, f"FLOPs of the baseline for the same loss; {_describe(speedup.interval)}"))
    return rows


def _prediction_rows(allocation: Allocation) -> list[Row]:
    suffix = " (extrapolated)" if allocation.is_extrapolated else ""
    names = {"params": "N*", "tokens": "D*", "loss": "loss"}
    return [
        (f"{label} at {allocation.flops:.3g} FLOPs{suffix}", f"{allocation.values[name]:.4g}",
         _describe(allocation.intervals[name]))
        for name, label in names.items()
    ]  # fmt: skip


def _describe(interval: Sequence[float] | None) -> str:
    return f"95 % {interval[0]:.4g} to {interval[1]:.4g}" if interval else "no interval"


def _mask(analysis: Analysis) -> str:
    settings = analysis.settings
    parts = [
        f"the {settings.drop_highest} highest losses" if settings.drop_highest else "",
        f"below {settings.min_flops:g} FLOPs" if settings.min_flops else "",
        f"{settings.max_flops:g} FLOPs or more" if settings.max_flops < math.inf else "",
        f"residuals beyond {settings.max_residual:g} robust deviations" if settings.max_residual else "",
    ]
    return ", ".join(filter(None, parts)) or "no mask"


def _intro(analysis: Analysis) -> str:
    law = "L = E + A / N^alpha + B / D^beta"
    if analysis.settings.fit.method == "kaplan":
        law = "L = ((N_c / N)^(alpha_n / alpha_d) + D_c / D)^alpha_d"
    warnings = "".join(f" Warning: {warning}." for warning in analysis.warnings)
    return f"{law}, of N parameters and D tokens, fitted to {len(analysis.observations)} runs.{warnings}"


def _sections(analysis: Analysis) -> list[Section]:
    sections = [
        Section(
            "Loss against compute",
            "Every row, the envelope of the rows that no cheaper row beats, and the law's loss at its optimal N and D "
            "with its band of 95 %. Dashed and on gray: beyond the rows.",
            picture=plots.plot_loss(analysis),
        ),
        Section(
            "IsoFLOP parabolas",
            "Solid over the sizes sampled, dotted beyond. Diamonds are the minima; hollow ones are not used.",
            picture=plots.plot_parabolas(analysis),
            table=_parabola_table(analysis),
        ),
        Section(
            "Optimal parameters and tokens",
            "By the law, the IsoFLOP minima and the envelope, with bands of 95 %; dashed beyond the rows.",
            picture=plots.plot_allocation(analysis),
        ),
        Section(
            "Loss over parameters and tokens",
            "Contours of the law, rows as points, and the compute-optimal line.",
            picture=plots.plot_contours(analysis),
        ),
        Section(
            "Residuals",
            "A trend in any of the three says that the law does not fit.",
            picture=plots.plot_residuals(analysis),
        ),
    ]
    if any(not held_out.problem for held_out in analysis.held_out):
        text = "Each budget predicted by a fit to the smaller ones: what the law is worth beyond its rows."
        sections.append(
            Section(
                "Roll-out over budgets",
                text,
                picture=plots.plot_held_out(analysis),
                table=_held_out_table(analysis),
            )
        )
    for prefix, title in ((SCORE, "Downstream scores"), (PERPLEXITY, "Perplexity by task")):
        if (picture := plots.plot_downstream(analysis, prefix)) is not None:
            text = "Against size and against held-out loss, a point a run."
            sections.append(Section(title, text, picture=picture))
    excluded = analysis.observations.excluded
    reasons = [("row", "reason"), *excluded.items()] if excluded else ()
    sections.append(Section("Rows left out", f"{len(excluded)} rows; {_mask(analysis)}.", table=reasons))
    sections.append(Section("Rows", "The rows that were fitted.", table=_row_table(analysis)))
    return sections


def _parabola_table(analysis: Analysis) -> Sequence[tuple[str, ...]]:
    header = ("FLOPs", "rows", "sizes", "N*", "D*", "loss", "center / N*", "used")
    return [
        header,
        *(
            (
                f"{p.flops:.3g}",
                str(p.num_rows),
                f"{p.lowest:.3g} to {p.highest:.3g}",
                *_numbers((p.params, p.tokens, p.loss, p.center_offset)),
                p.problem or "yes",
            )
            for p in analysis.parabolas
        ),
    ]


def _held_out_table(analysis: Analysis) -> Sequence[tuple[str, ...]]:
    header = ("predicted FLOPs", "rows", "fitted up to", "rows", "mean error", "largest error", "error of lowest loss")
    return [
        header,
        *(
            (
                f"{h.flops:.3g}",
                str(h.rows),
                f"{h.fitted_flops:.3g}",
                str(h.fitted_rows),
                *(
                    (h.problem, "–", "–")
                    if h.problem
                    else (f"{h.mean_error:+.2%}", f"{h.max_error:.2%}", f"{h.best_error:+.2%}")
                ),
            )
            for h in analysis.held_out
        ),
    ]


def _row_table(analysis: Analysis) -> Sequence[tuple[str, ...]]:
    rows = analysis.observations
    columns = (rows.params, rows.tokens, rows.flops, rows.loss, rows.loss * _ratios(analysis))
    header = ("row", "N", "D", "C", "loss", "predicted", "residual")
    return [
        header,
        *(
            (str(name), *_numbers(values), f"{values[-1] / values[-2] - 1:+.2%}")
            for name, *values in zip(rows.name, *columns, strict=True)
        ),
    ]


def _numbers(values: Iterable[float]) -> tuple[str, ...]:
    return tuple(f"{value:.4g}" if math.isfinite(value) else "–" for value in values)
