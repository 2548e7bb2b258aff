"""HTML report on run folders: a self-contained `report.html`, and its plots and tables as PNG and CSV files.

Used by `lfcc report` and the examples. Needs the extra `lfcc-kernels[report]`.
"""

import html
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lfcc_kernels.html import Picture, Rows, html_link, html_table, write_html, write_picture
from lfcc_kernels.text import aligned

from .run_folder import read_csv

_TERMS = {"ce": "cross-entropy", "kd": "logit KD loss", "lfcc": "LFCC loss"}


@dataclass(frozen=True)
class Run:
    """Logs of a run folder."""

    name: str
    folder: Path
    epochs: list[dict[str, float]]
    steps: list[dict[str, float]]
    versions: dict[str, object]


def write_report(
    runs: Sequence[str | Path],
    output: str | Path,
    *,
    title: str = "Distillation runs",
    text: Sequence[str] = (),
    table: Rows = (),
    pictures: Sequence[Picture] = (),
) -> Path:
    """Write a report on the run folders `runs` into the folder `output`. Returns the path of report.html.

    Args:
        runs: run folders.
        output: folder of the report.
        title: title of the page.
        text: paragraphs above the table.
        table: replaces the table of the last rows of the runs.
        pictures: further plots below the training curves.

    Raises FileNotFoundError for a folder without a finished epoch.
    """
    loaded = _load(runs)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(paragraph)}</p>" for paragraph in text),
        html_table(table or [_last_row(run) for run in loaded]),
        *(write_picture(picture, output) for picture in (_accuracy(loaded), _terms(loaded), *pictures)),
        "<h2>Environment</h2>",
        html_table(_environment(loaded)),
        "<h2>Data of the curves</h2>",
        *(f"<p>{_copy_csv(run, 'summary', output)}, {_copy_csv(run, 'steps', output)}</p>" for run in loaded),
    ]
    return write_html(output / "report.html", title, body)


def text_table(rows: Rows) -> str:
    """`rows` as a text table: the first column is left-aligned, the others right-aligned."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    lines.insert(1, ["-" * max(map(len, column)) for column in zip(*lines, strict=True)])
    return "\n".join(aligned(lines, left=1))


def _load(folders: Sequence[str | Path]) -> list[Run]:
    paths = [Path(folder).resolve() for folder in folders]
    short = len({path.name for path in paths}) == len(paths)
    runs = []
    for folder in paths:
        epochs, versions = read_csv(folder / "summary.csv"), folder / "versions.json"
        if not epochs:
            raise FileNotFoundError(
                f"{folder} is not a run folder with a finished epoch: summary.csv is missing or empty"
            )
        runs.append(
            Run(
                name=folder.name if short else f"{folder.parent.name}-{folder.name}",
                folder=folder,
                epochs=epochs,
                steps=read_csv(folder / "steps.csv"),
                versions=json.loads(versions.read_text()) if versions.is_file() else {},
            )
        )
    return runs


def _last_row(run: Run) -> dict[str, object]:
    last = run.epochs[-1]
    return {
        "run": run.name,
        "epochs": f"{last['epoch']:.0f}",
        "updates": f"{last['step']:.0f}",
        "top-1 (%)": f"{last['top1']:.2f}",
        "best top-1 (%)": f"{last['best_top1']:.2f}",
        "images/s": f"{last['images_per_second']:.0f}",
        "training time (s)": f"{last['seconds']:.0f}",
        "time in loss": f"{last['loss_share']:.1%}",
    }


def _environment(runs: Sequence[Run]) -> Rows:
    """One row per fact; one column per run, or a single column if all runs have the same versions."""
    same = all(run.versions == runs[0].versions for run in runs)
    columns = {"all runs": runs[0].versions} if same else {run.name: run.versions for run in runs}
    facts = dict.fromkeys(fact for versions in columns.values() for fact in versions)
    return [{"": fact, **{name: _plain(versions.get(fact)) for name, versions in columns.items()}} for fact in facts]


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)


def _accuracy(runs: Sequence[Run]) -> Picture:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, x, label in zip(
        figure.subplots(1, 2), ("step", "seconds"), ("updates", "training time (s)"), strict=True
    ):
        for run in runs:
            axes.plot([e[x] for e in run.epochs], [e["top1"] for e in run.epochs], marker=".", label=run.name)
        _label(axes, label, "top-1 accuracy (%)")
    return Picture(
        "accuracy", "Accuracy", "Validation accuracy during training, against updates and against time.", figure
    )


def _terms(runs: Sequence[Run]) -> Picture:
    terms = [term for term in _TERMS if any(term in row for run in runs for row in run.steps)]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, term in zip(figure.subplots(1, len(terms), squeeze=False)[0], terms, strict=True):
        for run, style in zip(runs, cycle(("-", "--", ":")), strict=False):  # so that overlapping curves are visible
            rows = [row for row in run.steps if term in row]
            # Also plotted without this term, so that a run has the same color in all panels.
            axes.plot(
                [row["step"] for row in rows], [row[term] for row in rows], style, label=run.name if rows else None
            )
        _label(axes, "updates", _TERMS[term])
    return Picture(
        "terms",
        "Loss terms",
        "Unweighted loss terms during training; each point is the mean since the previous one.",
        figure,
    )


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _copy_csv(run: Run, kind: str, output: Path) -> str:
    """Copy a CSV file of the run. Returns an HTML link to it."""
    name = f"{run.name}-{kind}.csv"
    shutil.copyfile(run.folder / f"{kind}.csv", output / name)
    return html_link(name)
