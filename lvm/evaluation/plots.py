"""Plots as PNG."""

from matplotlib.figure import Figure

from lvm.common.page import figure_png
from lvm.evaluation.figures import Plot


def plot_curves(plot: Plot) -> bytes:
    """Draws a plot's curves, with bands where points have intervals."""
    figure = Figure(figsize=(7.2, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, points in plot.series.items():
        x, y, *band = zip(*points, strict=True)
        (line,) = axes.plot(x, y, label=name, marker="o" if len(points) < 20 else None, linewidth=1.4, markersize=4)
        if band:
            low, high = band
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label, yscale="log" if plot.log_y else "linear")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if plot.series:
        axes.legend(frameon=False, fontsize=8)
    return figure_png(figure)
