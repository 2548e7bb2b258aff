"""Self-contained HTML pages with tables and plots, used by `lfcc report`. Needs the extra `lfcc-kernels[report]`."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from lfcc_kernels.files import write_file

Rows = Sequence[Mapping[str, object]]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto }
h1 { line-height: 1.2 } h2 { margin-top: 2.5rem }
table { border-collapse: collapse } th, td { padding: .3rem .9rem; text-align: right }
td { border-top: 1px solid #ddd } th:first-child, td:first-child { text-align: left }
.wide { width: max-content; max-width: 94vw; margin-left: 50%; transform: translateX(-50%) }
.wide { overflow-x: auto; font-size: .8rem }
figure { margin: 1rem 0 } img { max-width: 100% } figcaption { color: #555; font-size: .9rem }
"""


@dataclass(frozen=True)
class Picture:
    """A figure of the page. `name` is the stem of its PNG file."""

    name: str
    title: str
    caption: str
    figure: Figure


def write_html(page: Path, title: str, body: Sequence[str]) -> Path:
    """Write a page with this HTML body; returns its path."""
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>'
    lines = ["<!doctype html>", f'<html lang="en"><head>{head}</head><body>', *body, "</body></html>\n"]
    write_file(page, "\n".join(lines))
    return page


def write_picture(picture: Picture, output: Path) -> str:
    """Write the PNG file; returns HTML that embeds it."""
    png = io.BytesIO()
    picture.figure.savefig(png, format="png", dpi=120)
    write_file(output / f"{picture.name}.png", png.getvalue())
    title, source = html.escape(picture.title), base64.b64encode(png.getvalue()).decode()
    return (
        f'<h2>{title}</h2>\n<figure><img alt="{title}" src="data:image/png;base64,{source}">\n'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def html_table(rows: Rows) -> str:
    """One line per row, with the keys of the first row as head; empty without rows."""

    def line(cell: str, values: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{cell}>{html.escape(str(value))}</{cell}>" for value in values) + "</tr>"

    if not rows:
        return ""
    lines = (line("th", list(rows[0])), *(line("td", list(row.values())) for row in rows))
    return "\n".join(["<table>", *lines, "</table>"])


def html_link(name: str) -> str:
    """A link to a file in the folder of the page."""
    return f'<a href="{html.escape(name)}">{html.escape(name)}</a>'
