"""Plots of a record: series over one size, speedups over the fastest peer, and rates against the machine's ceilings."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from lfcc_kernels.bench.record import Row
from lfcc_kernels.bench.tables import Ranking, rankings, title
from lfcc_kernels.bench.targets import TARGETS
from lfcc_kernels.html import Picture

# Okabe and Ito's colors, which color-blind readers can distinguish.
LFCC, SLOWER, PEER = "#0072b2", "#d55e00", "#e69f00"
PEERS = ("#000000", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#999999")
_MARKERS = "sD^vP*X<>"
_AXES = {
    "B": "batch size B",
    "D": "row width D",
    "H*W": "cells of the map, H x W",
    "scales": "number of scales",
    "ranks": "number of ranks",
}
_LEAST_MEBIBYTES = 4 / 1024  # one page; 0 has no place on a logarithmic axis
_LINE = 0.21  # inches per case

Points = tuple[float, float, float]  # median, low and high value


def plots(rows: Sequence[Row]) -> list[Picture]:
    """All plots that the rows of one run allow."""
    found = rankings(rows)
    others = (speedups(found), roofline(found), bandwidth(found), floors(rows))
    return [*series(rows), *(picture for picture in others if picture)]


def series(rows: Sequence[Row]) -> list[Picture]:
    """Time against each size, then peak memory if it was measured."""
    sizes: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.axis:
            sizes[row.axis].append(row)
    return [
        Picture(f"{name.lower()}-against-{axis.lower().replace('*', 'x')}", f"{name} against {axis}", caption, figure)
        for name, label, points, caption in (
            ("Time", "time (ms)", _time, "Medians of rounds; the shaded band is the 20 % to 80 % quantile."),
            (
                "Memory",
                "peak memory (MiB)",
                _memory,
                "Peak memory beyond inputs, result and gradients, at least 4 KiB.",
            ),
        )
        for axis, some in sizes.items()
        if (figure := _panels(some, axis, label, points))
    ]


def _time(row: Row) -> Points | None:
    return None if row.median_ms is None else (row.median_ms, row.q20_ms, row.q80_ms)


def _memory(row: Row) -> Points | None:
    if row.peak_memory_bytes is None:
        return None
    return (max(row.peak_memory_bytes / 2**20, _LEAST_MEBIBYTES),) * 3


def _panels(rows: Sequence[Row], axis: str, label: str, points: Callable[[Row], Points | None]) -> Figure | None:
    """One panel per label, dtype and mode, with a line per candidate; None without a point."""
    panels: dict[str, dict[str, dict[int, Points]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if (point := points(row)) is not None:
            panels[f"{row.label} {row.dtype} {row.mode}"][row.name][row.x] = point
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
    for axes, (name, candidates) in zip(grid.flat, sorted(panels.items()), strict=False):
        for candidate, line in candidates.items():
            xs = sorted(line)
            middle, low, high = zip(*(line[x] for x in xs), strict=True)
            axes.fill_between(xs, low, high, color=styles[candidate]["color"], alpha=0.15, linewidth=0)
            (drawn[candidate],) = axes.plot(xs, middle, **styles[candidate])
        axes.set_title(name, fontsize=10)
        axes.set(xscale="log", yscale="log", xlabel=_AXES[axis])
        axes.grid(alpha=0.3)
        _plain(axes.yaxis)
        xs = sorted({x for line in candidates.values() for x in line})
        shown = xs[:: math.ceil(len(xs) / 6)]
        axes.set_xticks(shown, [f"{x}" for x in shown], fontsize=9)
        axes.set_xticks([], minor=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    names = [name for name in styles if name in drawn]
    handles = [drawn[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, object]]:
    """Line styles by candidate: lfcc thick and above the others."""
    lfcc = dict.fromkeys(row.name for row in rows if row.is_lfcc)
    peers = dict.fromkeys(row.name for row in rows if not row.is_lfcc)
    return {
        name: {"color": LFCC, "marker": "o", "linewidth": 2.5, "linestyle": line, "zorder": 3}
        for name, line in zip(lfcc, ("-", "--", ":", "-."), strict=False)
    } | {
        name: {
            "color": PEERS[number % len(PEERS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "markersize": 5,
            "linewidth": 1.3,
            "linestyle": ("-", "--")[number % 2],  # so that a line is visible under another
        }
        for number, name in enumerate(peers)
    }


def speedups(found: Sequence[Ranking]) -> Picture | None:
    """Bars of the speedup over the fastest peer, in increasing order."""
    if not found:
        return None
    figure, axes = _bars([title(ranking.lfcc) for ranking in found])
    for place, ranking in enumerate(found):
        speedup = ranking.speedup
        axes.barh(place, speedup - 1, left=1, color=SLOWER if speedup < 1 else LFCC, height=0.7)
        axes.annotate(
            f"{ranking.speedup_text} {ranking.fastest.name}",
            (max(speedup, 1), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    values = [ranking.speedup for ranking in found]
    axes.set(xscale="log", xlabel="speedup over the fastest peer: time of the peer / time of lfcc")
    low, high = min(0.9, *values) / 1.05, max(1.5, *values)
    axes.set_xlim(low, high * (high / low) ** 0.6)  # leaves space for the label of the longest bar
    axes.axvline(1, color="black", linewidth=1)
    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high / low < 500 else (1,)
    shown = [x for x in (step * 10.0**decade for decade in range(-4, 5) for step in steps) if low <= x <= high]
    axes.set_xticks(shown, [f"{x:g}x" for x in shown])
    axes.set_xticks([], minor=True)
    caption = (
        f"Each case against its fastest peer, on a logarithmic axis. lfcc is slower in {sum(x < 1 for x in values)} of "
        f"{len(found)} cases, which come first. The time of a peer excludes the conversion of its inputs."
    )
    return Picture("speedups", "Speedup over the fastest peer", caption, figure)


def roofline(found: Sequence[Ranking]) -> Picture | None:
    """FLOP rate against arithmetic intensity, one panel per dtype, for the cases that count FLOPs."""
    dtypes: dict[str, list[Ranking]] = defaultdict(list)
    for ranking in found:
        row = ranking.lfcc
        if row.flops and row.bytes and row.gemm_gflops and row.copy_gbps:
            dtypes[row.dtype].append(ranking)
    if not dtypes:
        return None
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axes, (dtype, some) in zip(panels, dtypes.items(), strict=True):
        copy = statistics.median(ranking.lfcc.copy_gbps for ranking in some)
        gemm = statistics.median(ranking.lfcc.gemm_gflops for ranking in some)
        intensities = [ranking.lfcc.flops / ranking.lfcc.bytes for ranking in some]
        ends = min(*intensities, gemm / copy) / 3, max(*intensities, gemm / copy) * 3
        axes.plot((ends[0], gemm / copy, ends[1]), (ends[0] * copy, gemm, gemm), color="black", linewidth=1.2)
        lfcc = [ranking.lfcc.flops / ranking.lfcc.median_ms / 1e6 for ranking in some]
        fastest = [ranking.fastest.flops / ranking.fastest.median_ms / 1e6 for ranking in some]
        axes.vlines(intensities, lfcc, fastest, color="#999999", linewidth=0.8)
        axes.scatter(intensities, lfcc, s=28, color=LFCC, marker="o", zorder=3, label="lfcc")
        axes.scatter(intensities, fastest, s=24, color=PEER, marker="D", zorder=2, label="fastest peer")
        axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOPs per byte)")
        _plain(axes.xaxis)
        _plain(axes.yaxis)
        axes.set_title(f"{dtype}: copy {copy:,.0f} GB/s, GEMM {gemm:,.0f} GFLOP/s", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("GFLOP/s")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    caption = (
        "Cases that count FLOPs, under the copy bandwidth and GEMM rate of this run (medians); a line joins the two "
        "points of a case. FLOPs and bytes are the least that the case needs; a peer may compute and move more."
    )
    return Picture("roofline", "Roofline of the compute-bound cases", caption, figure)


def bandwidth(found: Sequence[Ranking]) -> Picture | None:
    """Bytes per second, for the cases that count no FLOPs."""
    found = [r for r in found if r.lfcc.bytes and not r.lfcc.flops and r.lfcc.copy_gbps]
    if not found:
        return None
    found = sorted(found, key=lambda ranking: _gbps(ranking.lfcc))
    figure, axes = _bars([title(ranking.lfcc) for ranking in found])
    places = range(len(found))
    bars = axes.barh(places, [_gbps(ranking.lfcc) for ranking in found], color=LFCC, height=0.7)
    fastest = [_gbps(ranking.fastest) for ranking in found]
    marks = axes.scatter(fastest, places, color=PEER, edgecolor="black", marker="D", s=28, zorder=3)
    copy = statistics.median(ranking.lfcc.copy_gbps for ranking in found)
    roof = axes.axvline(copy, color="black", linestyle="--", linewidth=1.2)
    axes.set(xlabel="GB/s of the counted bytes", xlim=(0, 1.05 * max(copy, *fastest, _gbps(found[-1].lfcc))))
    names = ("lfcc", "fastest peer", f"copy bandwidth, {copy:,.0f} GB/s")
    figure.legend((bars, marks, roof), names, loc="outside lower center", ncols=3, frameon=False)
    caption = (
        "Cases that count bytes alone, slowest first: the least bytes to move divided by the time, and the copy "
        "bandwidth of this run (median)."
    )
    return Picture("bandwidth", "Bandwidth of the memory-bound cases", caption, figure)


def floors(rows: Sequence[Row]) -> Picture | None:
    """Bars of lfcc's fraction of the floor, by suite."""
    rows = [row for row in rows if row.candidate == "lfcc" and row.fraction_of_floor is not None]
    if not rows:
        return None
    suites: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.fraction_of_floor):
        suites[row.suite].append(row)
    counts = [len(some) for some in suites.values()]
    figure = Figure(figsize=(10, _LINE * sum(counts) + 0.4 * len(suites) + 0.8), layout="constrained")
    panels = figure.subplots(len(suites), 1, sharex=True, squeeze=False, height_ratios=counts)[:, 0]
    for axes, (suite, some) in zip(panels, suites.items(), strict=True):
        bars = axes.barh(range(len(some)), [100 * row.fraction_of_floor for row in some], color=LFCC, height=0.7)
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8, bbox={"color": "white", "pad": 0.6})
        for place, row in enumerate(some):
            for target in TARGETS:
                if (target.metric, target.cases) == ("floor", (row.case,)) and row.run in target.runs:
                    axes.plot((target.bound,) * 2, (place - 0.45, place + 0.45), color=PEER, linewidth=2.5)
        axes.axvline(100, color="black", linestyle="--", linewidth=1.2)
        axes.set_title(suite, fontsize=10, loc="left")
        _name(axes, [title(row) for row in some])
    panels[-1].set(xlabel="% of the floor", xlim=(0, 110 * max(1, *(row.fraction_of_floor for row in rows))))
    caption = (
        "The least time for the counted work, at the copy bandwidth and GEMM rate measured just before, divided by the "
        "time of lfcc. The dashed line is 100 %, a short line the target of a case. Values over 100 % occur if the "
        "machine's rates change during the measurement."
    )
    return Picture("floors", "Fraction of the floor", caption, figure)


def _bars(names: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure whose height suits the number of names."""
    figure = Figure(figsize=(10, _LINE * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    _name(axes, names)
    return figure, axes


def _name(axes: Axes, names: Sequence[str]) -> None:
    """One line per name, the first on top."""
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _plain(axis: Axis) -> None:
    """Label a logarithmic axis 0.1, 1, 10."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter())


def _gbps(row: Row) -> float:
    return row.bytes / row.median_ms / 1e6
