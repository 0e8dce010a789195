"""A self-contained HTML page: metrics, curves and pictures, all embedded."""

import base64
import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from jaxtyping import UInt8
from matplotlib import pyplot

from lvm.common.png import encode_png

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fafaf8; margin: 0 auto; padding: 2rem 1rem 4rem;
       max-width: 62rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .3rem; }
p { margin: .3rem 0 .7rem; color: #555; max-width: 46rem; }
img { max-width: 100%; display: block; background: #fff; border: 1px solid #e4e2dc; border-radius: 4px; }
table { border-collapse: collapse; background: #fff; border: 1px solid #e4e2dc; }
th, td { text-align: left; padding: .25rem .9rem; border-bottom: 1px solid #eeece6; font-weight: normal; }
td:nth-child(2) { text-align: right; font-variant-numeric: tabular-nums; font-weight: 600; }
td:nth-child(3) { color: #777; }
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, one or two sentences, and a picture as pixels or PNG."""

    title: str
    text: str
    picture: UInt8[np.ndarray, "H W 3"] | bytes

    @property
    def png(self) -> bytes:
        return self.picture if isinstance(self.picture, bytes) else encode_png(self.picture)


def render_page(title: str, intro: str, table: Sequence[tuple[str, str, str]], sections: Sequence[Section]) -> str:
    """A self-contained HTML page: title, introduction, a table of (name, value, meaning), then the sections."""
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table)
    blocks = "".join(
        f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p><img "
        f'alt="{html.escape(section.title)}" src="data:image/png;base64,{base64.b64encode(section.png).decode()}">'
        for section in sections
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>"
        f"<h2>Metrics</h2><table>{rows}</table>{blocks}</html>\n"
    )


def plot_curves(
    series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, log_y: bool = False
) -> bytes:
    """Plots name → points (x, y) as lines, as PNG."""
    figure, axes = pyplot.subplots(figsize=(7.2, 3.2), dpi=120)
    for name, points in series.items():
        x, y = zip(*points, strict=True)
        axes.plot(x, y, label=name, marker="o" if len(points) < 20 else None, linewidth=1.4, markersize=4)
    axes.set(xlabel=x_label, ylabel=y_label, yscale="log" if log_y else "linear")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if series:
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def metric_curve(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the records of a `metrics.jsonl` that have the key."""
    return [(float(record["step"]), float(record[key])) for record in records if key in record]
