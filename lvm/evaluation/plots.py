"""Plots as PNG."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lvm.common.page import figure_png
from lvm.evaluation.figures import Plot

_DPI = 120


def plot_curves(plot: Plot) -> bytes:
    """Draws a plot's curves, with bands where points have intervals."""
    figure = Figure(figsize=(7.2, 3.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    _draw(axes, plot)
    if plot.series:
        axes.legend(frameon=False, fontsize=8)
    return figure_png(figure)


def plot_grid(plots: Sequence[Plot], columns: int = 3) -> bytes:
    """Draws small plots of one curve each, side by side."""
    rows = -(-len(plots) // columns)
    figure = Figure(figsize=(9.6, 2.4 * rows), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, plot in zip(grid, plots, strict=False):
        _draw(axes, plot)
    for axes in grid[len(plots) :]:
        axes.set_axis_off()
    return figure_png(figure)


def _draw(axes: Axes, plot: Plot) -> None:
    for name, points in plot.series.items():
        x, y, *band = zip(*points, strict=True)
        (line,) = axes.plot(x, y, label=name, marker="o" if len(points) < 20 else None, linewidth=1.4, markersize=4)
        if band:
            low, high = band
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    scales = {"xscale": "log" if plot.log_x else "linear", "yscale": "log" if plot.log_y else "linear"}
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label, **scales)
    if not plot.log_x and all(
        point[0] % 1 == 0 for points in plot.series.values() for point in points
    ):  # steps, frames, images
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
