"""The page of a record: `report.html` with its pictures inside, beside it the PNG files and the record itself."""

import base64
import html
from dataclasses import replace
from pathlib import Path

from lfcc_kernels.bench import record, tables
from lfcc_kernels.bench.loss_figure import write_loss_figure
from lfcc_kernels.bench.pictures import pictures
from lfcc_kernels.bench.series import series
from lfcc_kernels.pages import html_link, html_table, write_html, write_picture

TITLE = "Benchmark of lfcc_kernels"


def write_page(path: str | Path, output: str | Path) -> Path:
    """Draw the record in the JSON file `path` into the folder `output`; returns the path of report.html.

    Raises ValueError where the file is no record, or one without rows.
    """
    path, output = Path(path), Path(output)
    results = record.load(path)
    rows = record.rows(results)
    if not rows:
        raise ValueError(f"{path} holds no rows: nothing was measured yet, go on with lfcc bench --resume")
    output.mkdir(parents=True, exist_ok=True)
    copy = output / path.name
    if copy.resolve() != path.resolve():
        record.save(copy, results)
    # A kept heap repeats some of the cases, whose times the tables have.
    drawn = "default" if "default" in results["runs"] else rows[0].run
    shown = [row for row in rows if row.run == drawn]
    where = f" The run under the {drawn} heap is drawn." if len(results["runs"]) > 1 else ""
    drawings = [replace(p, caption=p.caption + where) for p in (*series(shown), *pictures(shown))]
    environment = results["runs"][drawn]["environment"]
    device = ", ".join([environment.get("device", ""), *(f"{n} cores" for n in [environment.get("cores")] if n)])
    has_loss = write_loss_figure(shown, device, "/".join(path.parts[-2:]), output / "loss.svg")
    losing, others = tables.times(results)
    body = [
        f"<h1>{TITLE}</h1>",
        *(_paragraph(text) for text in (*tables.facts(results), tables.summary(results))),
        *([_loss_figure(output / "loss.svg", where)] if has_loss else []),
        *(write_picture(picture, output) for picture in drawings),
        *_section(tables.SLOWER, losing),
        *_section(tables.FASTER, others),
        *(_paragraph(note) for note in tables.notes(results)),
        *_section("Targets", tables.targets(results)),
        *_section(tables.MEMORY, tables.memory(results)),
        *_section("Not timed", tables.not_timed(results)),
        "<h2>The numbers</h2>",
        f"<p>{html_link(copy.name)}, {html_link(record.csv_path(copy).name)}</p>",
    ]
    return write_html(output / "report.html", TITLE, body)


def _loss_figure(svg: Path, where: str) -> str:
    source = base64.b64encode(svg.read_bytes()).decode()
    caption = f"Median time and peak memory beyond inputs, result and gradients.{where}"
    return (
        f'<h2>The whole loss</h2>\n<figure><img alt="LFCC loss" src="data:image/svg+xml;base64,{source}">\n'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _section(head: str, table: tables.Table) -> tuple[str, str]:
    """A table that may be wider than the text."""
    lines = f'<div class="wide">{html_table(table)}</div>' if table else "<p>None.</p>"
    return f"<h2>{html.escape(head)}</h2>", lines


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"
