"""Pictures of what grows along a series: time and memory against B, D, H x W, the scales or the ranks."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from lfcc_kernels.bench.record import Row
from lfcc_kernels.pages import Picture

OURS = "#0072b2"  # in every picture; the others of Okabe and Ito's colors, which the color-blind can tell apart
PEERS = ("#000000", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#999999")
_MARKERS = "sD^vP*X<>"
_AXES = {"B": "B, rows of the batch", "D": "D, values a row", "H*W": "H*W, cells of the map", "ranks": "processes"}
_LEAST_MEBIBYTES = 4 / 1024  # a page; less has no place on a logarithmic axis

Points = tuple[float, float, float]  # middle, low and high value at one place
Style = dict[str, object]


def series(rows: Sequence[Row]) -> list[Picture]:
    """Time against each axis, then memory where it was measured; the rows are those of one run."""
    axes: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.axis:
            axes[row.axis].append(row)
    return [
        Picture(f"{named.lower()}-against-{axis.lower().replace('*', 'x')}", f"{named} against {axis}", caption, figure)
        for named, quantity, points, caption in (
            ("Time", "time, ms", _times, "Medians of rounds, shaded from the 20 to the 80 % quantile."),
            ("Memory", "peak memory, MiB", _peaks, "Peak memory beyond inputs, result and gradients, 4 KiB at least."),
        )
        for axis, some in axes.items()
        if (figure := _panels(some, axis, quantity, points))
    ]


def plain(axis: Axis) -> None:
    """Label a logarithmic axis 0.1, 1, 10."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter())


def _times(row: Row) -> Points | None:
    return None if row.median_ms is None else (row.median_ms, row.q20_ms, row.q80_ms)


def _peaks(row: Row) -> Points | None:
    if row.peak_memory_bytes is None:
        return None
    return (max(row.peak_memory_bytes / 2**20, _LEAST_MEBIBYTES),) * 3


def _panels(rows: Sequence[Row], axis: str, quantity: str, points: Callable[[Row], Points | None]) -> Figure | None:
    """One panel a label, dtype and mode, with a line a candidate; None where no row has the quantity."""
    panels: dict[str, dict[str, dict[int, Points]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if (point := points(row)) is not None:
            panels[f"{row.label} {row.dtype} {row.mode}"][row.candidate][row.x] = point
    if not panels:
        return None
    styles = _styles(rows)
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(10, 3.1 * lines + 0.8), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    drawn = {}
    for axes, (title, candidates) in zip(grid.flat, sorted(panels.items()), strict=False):
        for name, line in candidates.items():
            xs = sorted(line)
            middle, low, high = zip(*(line[x] for x in xs), strict=True)
            axes.fill_between(xs, low, high, color=styles[name]["color"], alpha=0.15, linewidth=0)
            (drawn[name],) = axes.plot(xs, middle, **styles[name])
        axes.set_title(title, fontsize=10)
        axes.set(xscale="log", yscale="log", xlabel=_AXES.get(axis, axis))
        axes.grid(alpha=0.3)
        plain(axes.yaxis)
        _ticks(axes, sorted({x for line in candidates.values() for x in line}))
    for axes in grid[:, 0]:
        axes.set_ylabel(quantity)
    names = [name for name in styles if name in drawn]
    handles = [drawn[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _ticks(axes: Axes, xs: Sequence[int]) -> None:
    """At measured places, at most six."""
    shown = xs[:: math.ceil(len(xs) / 6)]
    axes.set_xticks(shown, [f"{x}" for x in shown], fontsize=9)
    axes.set_xticks([], minor=True)


def _styles(rows: Sequence[Row]) -> dict[str, Style]:
    """Line styles of all candidates: ours thick and above the others."""
    ours = dict.fromkeys(row.candidate for row in rows if row.ours)
    peers = dict.fromkeys(row.candidate for row in rows if not row.ours)
    return {
        name: {"color": OURS, "marker": "o", "linewidth": 2.5, "linestyle": line, "zorder": 3}
        for name, line in zip(ours, ("-", "--", ":", "-."), strict=False)
    } | {
        name: {
            "color": PEERS[number % len(PEERS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "markersize": 5,
            "linewidth": 1.3,
            "linestyle": ("-", "--")[number % 2],  # so that one that covers another lets it be seen
        }
        for number, name in enumerate(peers)
    }
