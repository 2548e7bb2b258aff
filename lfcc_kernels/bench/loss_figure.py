"""The figure at the top of the README, `loss.svg`: time and peak memory of the whole LFCC loss, from a record."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lfcc_kernels.bench.record import Row
from lfcc_kernels.files import write_file

PAIR, SERIES = "average", "lfcc-over-B"  # labels of the cases that are drawn
NAMES = {
    "lfcc": "lfcc",  # "pool first": pools the student's maps and then projects them, as LFCCLoss does
    "compiled eager, pooled first": "torch.compile, pool first",
    "eager, pooled first": "eager, pool first",
    "compiled eager": "torch.compile",
    "eager": "eager",
}
_COLORS = dict(zip(NAMES, ("#0072b2", "#009e73", "#56b4e9", "#e69f00", "#555555"), strict=True))
_QUANTITIES = {"time": "time (ms)", "memory": "peak memory (MiB)"}


def loss_values(rows: Sequence[Row]) -> dict:
    """The plotted values of one run; empty if the rows lack a case.

    `{"pair" or "series": {"B": [...], CANDIDATE: {"time": [...], "memory": [...]}}}`, one value per batch size.
    """
    rows = [row for row in rows if row.mode == "fwd+bwd" and row.median_ms and row.peak_memory_bytes]
    pair = [row for row in rows if (row.suite, row.label) == ("lfcc", PAIR)]
    series = [row for row in rows if (row.suite, row.label) == ("scaling", SERIES)]
    return {"pair": _values(pair), "series": _values(series)} if pair and series else {}


def _values(rows: Sequence[Row]) -> dict:
    batches = sorted({row.shape[0] for row in rows})
    measured = {(row.candidate, row.shape[0]): row for row in rows}
    return {"B": batches} | {
        name: {
            "time": [measured[name, batch].median_ms for batch in batches],
            "memory": [measured[name, batch].peak_memory_bytes / 2**20 for batch in batches],
        }
        for name in NAMES
        if all((name, batch) in measured for batch in batches)
    }


def write_loss_figure(rows: Sequence[Row], device: str, source: str, output: Path) -> bool:
    """Write the SVG file if the rows, of one run, have both cases; returns whether they have.

    The same values give the same bytes under one version of matplotlib. The file's metadata contains `source`, the
    name of the record, and the plotted values as JSON.
    """
    values = loss_values(rows)
    if not values:
        return False
    svg = io.BytesIO()
    metadata = {"Title": "LFCC loss", "Source": source, "Description": json.dumps(values), "Date": None}
    with matplotlib.rc_context({"svg.hashsalt": "lfcc"}):
        _draw(values, device).savefig(svg, format="svg", metadata=metadata)
    write_file(output, b"\n".join(line.rstrip() for line in svg.getvalue().splitlines()) + b"\n")
    return True


def _draw(values: dict, device: str) -> Figure:
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    figure.suptitle(f"LFCC loss, forward + backward, float32, {device}", fontsize=13)
    for row, axes in zip(_QUANTITIES.items(), figure.subplots(2, 2).T, strict=True):
        _bars(axes[0], values["pair"], *row)
        _lines(axes[1], values["series"], *row)
    return figure


def _bars(axes: Axes, case: dict, quantity: str, label: str) -> None:
    (batch,), names = case["B"], [name for name in NAMES if name in case]
    lengths = [case[name][quantity][0] for name in names]
    bars = axes.barh([NAMES[name] for name in names], lengths, color=[_COLORS[name] for name in names], height=0.7)
    axes.bar_label(bars, [f"{value:,.0f}" for value in lengths], padding=4, fontsize=9)
    axes.set(xlabel=label, xlim=(0, 1.2 * max(lengths)))
    axes.set_title(f"ResNet-18 from Swin-T, 4 stages, B = {batch}", fontsize=10)
    axes.invert_yaxis()


def _lines(axes: Axes, case: dict, quantity: str, label: str) -> None:
    for name in reversed([name for name in NAMES if name in case]):
        style = {"linewidth": 2.5, "zorder": 3} if name == "lfcc" else {"linewidth": 1.5}
        axes.plot(case["B"], case[name][quantity], "o-", color=_COLORS[name], label=NAMES[name], **style)
    axes.set(xscale="log", yscale="log", xlabel="batch size B", ylabel=label)
    axes.set_xticks(case["B"], [str(batch) for batch in case["B"]])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.set_title("Small maps: 1 stage of 32 channels, 4 x 4", fontsize=10)
    axes.legend(fontsize=9, frameon=False)
