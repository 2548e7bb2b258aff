"""The HTML report of a record, `lfcc report RECORD.json`: tables and plots in one page, and the same plots as files."""

import base64
import html
from dataclasses import replace
from pathlib import Path

from lfcc_kernels.bench import record, tables
from lfcc_kernels.bench.loss_figure import write_loss_figure
from lfcc_kernels.bench.plots import plots
from lfcc_kernels.html import html_link, html_table, write_html, write_picture

TITLE = "lfcc_kernels benchmark"


def write_report(path: str | Path, output: str | Path) -> Path:
    """Write the report of the record in the JSON file `path` into the folder `output`; returns the path of report.html.

    The folder also gets a copy of the record, its tables as Markdown, the plots as PNG files and, if the record has the
    whole loss, `loss.svg`.
    Raises ValueError if the file is not a record or has no rows.
    """
    path, output = Path(path), Path(output)
    results = record.load(path)
    rows = record.rows(results)
    if not rows:
        raise ValueError(f"{path} has no rows because nothing was measured; continue with lfcc bench --resume {path}")
    output.mkdir(parents=True, exist_ok=True)
    copy = output / path.name
    if copy.resolve() != path.resolve():
        record.save(copy, results)
        tables.save(copy, results)
    # A kept heap repeats some of the cases; the tables have those times.
    run = "default" if "default" in results["runs"] else rows[0].run
    note = f" The plots show the run with the {run} heap." if len(results["runs"]) > 1 else ""
    shown = [row for row in rows if row.run == run]
    slower, faster = tables.times(results)
    body = [
        f"<h1>{TITLE}</h1>",
        *(_paragraph(text) for text in (*tables.facts(results), tables.summary(results))),
        *_loss_figure(results["runs"][run]["environment"], shown, path, output / "loss.svg", note),
        *(write_picture(replace(p, caption=p.caption + note), output) for p in plots(shown)),
        *_section(tables.SLOWER, slower),
        *_section(tables.FASTER, faster),
        *(_paragraph(text) for text in tables.notes(results)),
        *_section("Targets", tables.targets(results)),
        *_section(tables.MEMORY, tables.memory(results)),
        *_section("Not timed", tables.not_timed(results)),
        "<h2>Data</h2>",
        f"<p>{html_link(copy.name)}, {html_link(record.csv_path(copy).name)}</p>",
    ]
    return write_html(output / "report.html", TITLE, body)


def _loss_figure(environment: dict, rows: list[record.Row], path: Path, svg: Path, note: str) -> list[str]:
    cores = f", {environment['cores']} cores" if "cores" in environment else ""
    if not write_loss_figure(rows, f"{environment.get('device', '')}{cores}", "/".join(path.parts[-2:]), svg):
        return []
    source = base64.b64encode(svg.read_bytes()).decode()
    caption = f"Median time and peak memory beyond inputs, result and gradients.{note}"
    return [
        f'<h2>LFCC loss</h2>\n<figure><img alt="LFCC loss" src="data:image/svg+xml;base64,{source}">\n'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    ]


def _section(head: str, table: tables.Table) -> tuple[str, str]:
    """A table that may be wider than the text."""
    lines = f'<div class="wide">{html_table(table)}</div>' if table else "<p>None.</p>"
    return f"<h2>{html.escape(head)}</h2>", lines


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"
