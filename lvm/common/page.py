"""A self-contained HTML page: title, introduction, table of metrics, sections of text, pictures and tables."""

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
       max-width: 62rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .3rem; }
p { margin: .3rem 0 .7rem; color: #555; max-width: 46rem; }
img { max-width: 100%; display: block; background: #fff; border: 1px solid #e4e2dc; border-radius: 4px; }
table { border-collapse: collapse; background: #fff; border: 1px solid #e4e2dc; }
th, td { text-align: left; padding: .25rem .9rem; border-bottom: 1px solid #eeece6; font-weight: normal; }
td:nth-child(2) { text-align: right; font-variant-numeric: tabular-nums; font-weight: 600; }
td:nth-child(3) { color: #777; }
table.data { font-size: 12px; } table.data td, table.data th { text-align: right; color: #222; font-weight: normal; }
table.data th { color: #777; } table.data td:first-child { text-align: left; }
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, one or two sentences, a picture as pixels or PNG, and a table whose first row is its header."""

    title: str
    text: str
    picture: UInt8[np.ndarray, "H W 3"] | bytes | None = None
    table: Sequence[Sequence[str]] = ()

    @property
    def png(self) -> bytes:
        """The picture.

        Raises:
          ValueError: there is none.
        """
        if self.picture is None:
            raise ValueError(f"section {self.title!r} has no picture")
        return self.picture if isinstance(self.picture, bytes) else encode_png(self.picture)


def render_page(title: str, intro: str, table: Sequence[Row], sections: Sequence[Section]) -> str:
    """A self-contained HTML page: title, introduction, a table of metrics, then the sections."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>"
        f"<h2>Metrics</h2>{_render_table(table)}{''.join(map(_render_section, sections))}</html>\n"
    )


def _render_section(section: Section) -> str:
    blocks = [f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>"]
    if section.picture is not None:
        data = base64.b64encode(section.png).decode()
        blocks.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
    if section.table:
        header = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.table[0])
        blocks.append(_render_table(section.table[1:], f"<tr>{header}</tr>").replace("<table>", '<table class="data">'))
    return "".join(blocks)


def _render_table(rows: Sequence[Sequence[str]], header: str = "") -> str:
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{header}{body}</table>"


def figure_png(figure: Figure) -> bytes:
    """The figure as PNG, without the name of a program in it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
