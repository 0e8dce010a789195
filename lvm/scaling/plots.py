"""Figures of an analysis, each as PNG."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullLocator

from lvm.common.page import figure_png
from lvm.scaling.analysis import Allocation, Analysis
from lvm.scaling.observations import PERPLEXITY, SCORE
from lvm.scaling.parametric import log_residuals

_COLORS = {"parametric": "#1f4e8c", "isoflop": "#c4572b", "envelope": "#3c8c5a"}
_LABELS = {"parametric": "law", "isoflop": "IsoFLOP minima", "envelope": "envelope"}
_DPI = 120


def plot_loss(analysis: Analysis) -> bytes:
    """Loss against FLOPs: rows colored by N, their envelope, and the law's compute-optimal loss with its band."""
    rows = analysis.observations
    figure, axes = _figure(1, (7.6, 4.4))
    points = axes[0].scatter(rows.flops, rows.loss, c=rows.params, norm=_size_norm(analysis), s=14, cmap="viridis")
    envelope = analysis.envelope
    axes[0].step(
        envelope.flops, envelope.loss, where="post", color=_COLORS["envelope"], label="envelope", linewidth=1.2
    )
    _plot_curve(axes[0], analysis.curves["parametric"], "loss", "parametric", "compute-optimal loss by the law")
    axes[0].axhline(analysis.fit.law.irreducible_loss, color="#888", linewidth=0.8, linestyle=":")
    axes[0].set(xscale="log", yscale="log", xlabel="training FLOPs C", ylabel="loss, nats per token")
    _plain_ticks(axes[0])
    _shade_extrapolation(axes[0], analysis)
    axes[0].legend(frameon=False, fontsize=8)
    figure.colorbar(points, ax=axes[0], label="parameters N")
    return figure_png(figure)


def plot_parabolas(analysis: Analysis) -> bytes:
    """IsoFLOP parabolas: solid over the sizes sampled and dotted beyond; unused minima are hollow."""
    rows = analysis.observations
    figure, axes = _figure(1, (7.6, 4.4))
    numbers = rows.budgets()
    colors = colormaps["plasma"](np.linspace(0, 0.85, max(2, len(analysis.parabolas))))
    for number, (parabola, color) in enumerate(zip(analysis.parabolas, colors, strict=False)):
        budget = rows.take(numbers == number)
        label = f"{parabola.flops:.2g}" + (" (unused)" if parabola.problem else "")
        axes[0].scatter(budget.params, budget.loss, color=color, s=10, label=label)
        if not parabola.polynomial:
            continue
        inside = np.geomspace(parabola.lowest, parabola.highest, 60)
        axes[0].plot(inside, np.polyval(parabola.polynomial, np.log(inside)), color=color, linewidth=1.3)
        for end, factor in ((parabola.lowest, 1 / 1.6), (parabola.highest, 1.6)):
            outside = np.geomspace(end, end * factor, 20)
            curve = np.polyval(parabola.polynomial, np.log(outside))
            axes[0].plot(outside, curve, color=color, linewidth=1, linestyle=":")
        if np.isfinite(parabola.loss) and parabola.lowest / 2 < parabola.params < parabola.highest * 2:
            face = "none" if parabola.problem else color
            axes[0].scatter(parabola.params, parabola.loss, marker="D", s=42, facecolor=face, edgecolor=color, zorder=3)
    span = np.ptp(rows.loss)
    axes[0].set(xscale="log", xlabel="parameters N", ylabel="loss, nats per token")
    axes[0].set_ylim(rows.loss.min() - 0.08 * span, rows.loss.max() + 0.05 * span)
    axes[0].legend(frameon=False, fontsize=7, title="FLOPs", title_fontsize=8, ncols=1 + len(analysis.parabolas) // 12)
    return figure_png(figure)


def plot_allocation(analysis: Analysis) -> bytes:
    """N* and D* against FLOPs by each approach, with bands of 95 %."""
    figure, axes = _figure(2, (9.6, 4.0))
    for axis, name, label in ((axes[0], "params", "optimal parameters N*"), (axes[1], "tokens", "optimal tokens D*")):
        for approach, curve in analysis.curves.items():
            _plot_curve(axis, curve, name, approach, _LABELS[approach])
        used = [parabola for parabola in analysis.parabolas if not parabola.problem]
        axis.scatter(
            [p.flops for p in used], [getattr(p, name) for p in used], color=_COLORS["isoflop"], s=18, marker="D"
        )
        envelope = analysis.envelope
        axis.scatter(envelope.flops, getattr(envelope, name), color=_COLORS["envelope"], s=10)
        axis.set(xscale="log", yscale="log", xlabel="training FLOPs C", ylabel=label)
        _shade_extrapolation(axis, analysis)
    axes[0].legend(frameon=False, fontsize=8)
    return figure_png(figure)


def plot_contours(analysis: Analysis) -> bytes:
    """Contours of the law's loss over N and D, the rows, and the compute-optimal line."""
    rows = analysis.observations
    figure, axes = _figure(1, (7.2, 4.8))
    optima = analysis.curves["parametric"]
    ends = [np.array([curve.values[name] for curve in optima]) for name in ("params", "tokens")]
    params, tokens = (
        np.geomspace(min(x.min(), y.min()) / 1.5, max(x.max(), y.max()) * 1.5, 120)
        for x, y in zip((rows.params, rows.tokens), ends, strict=True)
    )
    N, D = np.meshgrid(params, tokens)
    losses = analysis.fit.law.loss(N.ravel(), D.ravel()).reshape(N.shape)
    floor = analysis.fit.law.irreducible_loss
    levels = floor + np.geomspace(losses.min() - floor, losses.max() - floor, 18)
    colors = colormaps["viridis"](np.linspace(0, 0.8, len(levels)))  # without the yellow, which is hard to read
    contours = axes[0].contour(N, D, losses, levels=levels, colors=colors, linewidths=1)
    axes[0].clabel(contours, fontsize=7, fmt="%.3g")
    axes[0].scatter(rows.params, rows.tokens, color="#333", s=8, zorder=3)
    is_inside = np.array([not curve.is_extrapolated for curve in optima])
    axes[0].plot(*ends, color=_COLORS["parametric"], linestyle="--", linewidth=1.4, label="optimum, extrapolated")
    axes[0].plot(*(x[is_inside] for x in ends), color=_COLORS["parametric"], linewidth=2, label="optimum")
    axes[0].set(xscale="log", yscale="log", xlabel="parameters N", ylabel="tokens D")
    axes[0].legend(frameon=False, fontsize=8)
    return figure_png(figure)


def plot_residuals(analysis: Analysis) -> bytes:
    """Relative residuals of the fitted rows against N, D and C; positive where the law is too high."""
    rows = analysis.observations
    residuals = 100 * np.expm1(log_residuals(analysis.fit.law, rows))
    figure, axes = _figure(3, (9.6, 3.2), sharey=True)
    labels = ("parameters N", "tokens D", "training FLOPs C")
    for axis, values, label in zip(axes, (rows.params, rows.tokens, rows.flops), labels, strict=True):
        axis.scatter(values, residuals, s=9, color="#1f4e8c", alpha=0.7)
        axis.axhline(0, color="#888", linewidth=0.8)
        axis.set(xscale="log", xlabel=label)
        _few_ticks(axis)
    axes[0].set_ylabel("predicted over observed loss − 1, %")
    return figure_png(figure)


def plot_held_out(analysis: Analysis) -> bytes:
    """Relative errors of each budget's losses, predicted by a fit to the smaller budgets."""
    predicted = [held_out for held_out in analysis.held_out if not held_out.problem]
    figure, axes = _figure(1, (7.2, 3.2))
    flops = [held_out.flops for held_out in predicted]
    for name, label, marker in (("mean_error", "mean", "o"), ("best_error", "lowest loss", "D")):
        errors = [100 * getattr(held_out, name) for held_out in predicted]
        axes[0].plot(flops, errors, marker=marker, label=label, markersize=4)
    axes[0].axhline(0, color="#888", linewidth=0.8)
    axes[0].set(xscale="log", xlabel="FLOPs of the predicted budget", ylabel="predicted over observed − 1, %")
    _few_ticks(axes[0])
    axes[0].legend(frameon=False, fontsize=8)
    return figure_png(figure)


def plot_downstream(analysis: Analysis, prefix: str) -> bytes | None:
    """Downstream metrics with a prefix (`SCORE` or `PERPLEXITY`) against N and against loss; None if no row has any."""
    rows = analysis.observations
    names = [name for name in rows.metrics if name.startswith(prefix) and np.isfinite(rows.metrics[name]).any()]
    if not names:
        return None
    figure, axes = _figure(2, (9.6, 3.8), sharey=True)
    for name in sorted(names):
        values = rows.metrics[name]
        for axis, x in zip(axes, (rows.params, rows.loss), strict=True):
            axis.plot(x, values, "o", markersize=4, label=name.removeprefix(prefix))
    label = "score" if prefix == SCORE else "perplexity"
    axes[0].set(xscale="log", xlabel="parameters N", ylabel=label)
    _few_ticks(axes[0])
    axes[1].set(xlabel="held-out loss, nats per token")
    if prefix == PERPLEXITY:
        for axis in axes:
            axis.set_yscale("log")
            _plain_ticks(axis)
    axes[0].legend(frameon=False, fontsize=8)
    return figure_png(figure)


def _figure(columns: int, size: tuple[float, float], sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, columns, sharey=sharey)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _plot_curve(axes: Axes, curve: Sequence[Allocation], name: str, approach: str, label: str) -> None:
    """A solid line where there are rows and a dashed one beyond, with its band."""
    flops = np.array([point.flops for point in curve])
    values = np.array([point.values[name] for point in curve])
    is_inside = np.array([not point.is_extrapolated for point in curve])
    color = _COLORS[approach]
    axes.plot(flops, values, color=color, linestyle="--", linewidth=1.1)
    axes.plot(flops[is_inside], values[is_inside], color=color, linewidth=1.7, label=label)
    bands = [point.intervals[name] for point in curve]
    if all(band is not None for band in bands):
        low, high = np.array(bands, np.float64).T
        axes.fill_between(flops, low, high, color=color, alpha=0.16, linewidth=0)


def _shade_extrapolation(axes: Axes, analysis: Analysis) -> None:
    """A gray ground over FLOPs beyond the largest row's."""
    top = analysis.observations.flops.max()
    right = max(point.flops for point in analysis.curves["parametric"])
    if right > top * 1.01:
        axes.axvspan(top, right, color="#000", alpha=0.05, linewidth=0)
        axes.text(top, 0.985, " extrapolated", transform=axes.get_xaxis_transform(), fontsize=7, va="top", color="#666")


def _plain_ticks(axes: Axes) -> None:
    """Round numbers on a logarithmic axis of less than a decade."""
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")


def _few_ticks(axes: Axes) -> None:
    """1, 2 and 5 times powers of ten on the logarithmic axis of x, whose labels would overlap otherwise."""
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 0.5)))


def _size_norm(analysis: Analysis) -> LogNorm:
    params = analysis.observations.params
    return LogNorm(params.min(), params.max())
