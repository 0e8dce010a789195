"""A self-contained HTML page: title, introduction, table of metrics, sections of tables, text and pictures."""

import base64
import dataclasses
import html
import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from lvm.common.png import encode_png

Row = tuple[str, str, str]  # name, value, meaning
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fafaf8; margin: 0 auto; padding: 2rem 1rem 4rem;
       max-width: 76rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .3rem 0 .7rem; color: #555; max-width: 46rem; }
img { max-width: 100%; display: block; background: #fff; border: 1px solid #e4e2dc; border-radius: 4px; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; background: #fff; border: 1px solid #e4e2dc; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem; border-bottom: 1px solid #eeece6;
         font-weight: normal; }
th { color: #777; }
td:nth-child(2) { text-align: right; font-variant-numeric: tabular-nums; font-weight: 600; white-space: nowrap; }
td:nth-child(n+3) { color: #777; } td:nth-child(n+4) { min-width: 10rem; }
table.data { font-size: 12px; } table.data td, table.data th { text-align: right; font-weight: normal; }
table.data td { color: #222; min-width: 0; } table.data td:first-child { text-align: left; }
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page. The first row of a table is its header; columns that are empty below it are left out.

    Attributes:
      title: the heading.
      text: one or two sentences.
      metrics: a table of words: name, value, and what explains it.
      picture: pixels or PNG.
      table: a table of numbers.
      level: of the heading, 2 or 3.
    """

    title: str
    text: str = ""
    metrics: Sequence[Sequence[str]] = ()
    picture: UInt8[np.ndarray, "H W 3"] | bytes | None = None
    table: Sequence[Sequence[str]] = ()
    level: int = 2


def render_page(title: str, intro: str, table: Sequence[Row], sections: Sequence[Section]) -> str:
    """A self-contained HTML page: title, introduction, a table of metrics unless it is empty, then the sections."""
    metrics = f"<h2>Metrics</h2>{_render_table(table)}" if table else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>"
        f"{metrics}{''.join(map(_render_section, sections))}</html>\n"
    )


def _render_section(section: Section) -> str:
    heading = html.escape(section.title)
    blocks = [f"<h{section.level}>{heading}</h{section.level}>"]
    if section.text:
        blocks.append(f"<p>{html.escape(section.text)}</p>")
    if section.metrics:
        blocks.append(_render_table(section.metrics[1:], section.metrics[0]))
    if section.picture is not None:
        png = section.picture if isinstance(section.picture, bytes) else encode_png(section.picture)
        blocks.append(f'<img alt="{heading}" src="data:image/png;base64,{base64.b64encode(png).decode()}">')
    if section.table:
        blocks.append(_render_table(section.table[1:], section.table[0], ' class="data"'))
    return "".join(blocks)


def _render_table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), style: str = "") -> str:
    columns = [i for i in range(max(map(len, rows), default=0)) if any(row[i] for row in rows)]

    def render(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(row[i])}</{tag}>" for i in columns) + "</tr>"

    head = render(header, "th") if header else ""
    body = "".join(render(row, "td") for row in rows)
    return f'<div class="wide"><table{style}>{head}{body}</table></div>'


def figure_png(figure: Figure) -> bytes:
    """The figure as PNG, without the name of a program in it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
