"""Pictures of all cases of a run beside each other: against the machine's ceilings, and against the fastest peer."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lfcc_kernels.bench.record import Row
from lfcc_kernels.bench.series import OURS, plain
from lfcc_kernels.bench.tables import Ranking as Standing
from lfcc_kernels.bench.tables import rankings as standings
from lfcc_kernels.bench.tables import title
from lfcc_kernels.bench.targets import TARGETS
from lfcc_kernels.pages import Picture

PEER, LOSS, GOAL = "#e69f00", "#d55e00", "#e69f00"
_LINE = 0.21  # inches a case


def pictures(rows: Sequence[Row]) -> list[Picture]:
    """All that these rows, of one run, can show."""
    found = standings(rows)
    made = (wins_and_losses(found), roofline(found), bandwidth(found), floors(rows))
    return [picture for picture in made if picture]


def wins_and_losses(found: Sequence[Standing]) -> Picture | None:
    """Bars of the fastest peer's time over ours, losses first."""
    if not found:
        return None
    figure, axes = _lines(len(found))
    for place, standing in enumerate(found):
        margin = standing.speedup
        axes.barh(place, margin - 1, left=1, color=LOSS if margin < 1 else OURS, height=0.7)
        axes.annotate(
            f"{standing.speedup_text} {standing.fastest.candidate}",
            (max(margin, 1), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    margins = [standing.speedup for standing in found]
    axes.set(xscale="log", xlabel="time of the fastest peer / time of ours")
    low, high = min(0.9, *margins) / 1.05, max(1.5, *margins)
    axes.set_xlim(low, high * (high / low) ** 0.6)  # with place for the label of the longest bar
    axes.axvline(1, color="black", linewidth=1)
    _factors(axes)
    _name(axes, [title(standing.lfcc) for standing in found])
    lost = sum(margin < 1 for margin in margins)
    caption = (
        f"Every case against the fastest of all that is not ours, on a logarithmic axis: ours loses {lost} of "
        f"{len(found)}, which come first. A peer's conversion of its inputs is not in its time."
    )
    return Picture("wins-and-losses", "Wins and losses", caption, figure)


def roofline(found: Sequence[Standing]) -> Picture | None:
    """Reached FLOP rate against FLOPs a byte, one panel a dtype, for the cases that count FLOPs."""
    dtypes: dict[str, list[Standing]] = defaultdict(list)
    for standing in found:
        if standing.lfcc.flops and standing.lfcc.bytes and standing.lfcc.gemm_gflops and standing.lfcc.copy_gbps:
            dtypes[standing.lfcc.dtype].append(standing)
    if not dtypes:
        return None
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axes, (dtype, some) in zip(panels, dtypes.items(), strict=True):
        copy = statistics.median(standing.lfcc.copy_gbps for standing in some)
        gemm = statistics.median(standing.lfcc.gemm_gflops for standing in some)
        intensities = [standing.lfcc.flops / standing.lfcc.bytes for standing in some]
        ends = min(*intensities, gemm / copy) / 3, max(*intensities, gemm / copy) * 3
        axes.plot((ends[0], gemm / copy, ends[1]), (ends[0] * copy, gemm, gemm), color="black", linewidth=1.2)
        ours, fastest = (
            [_gflops(row) for row in rows] for rows in zip(*((s.lfcc, s.fastest) for s in some), strict=True)
        )
        axes.vlines(intensities, ours, fastest, color="#999999", linewidth=0.8)
        axes.scatter(intensities, ours, s=28, color=OURS, marker="o", zorder=3, label="ours")
        axes.scatter(intensities, fastest, s=24, color=PEER, marker="D", zorder=2, label="fastest peer")
        axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte counted")
        plain(axes.xaxis)
        plain(axes.yaxis)
        axes.set_title(f"{dtype}: copy {copy:,.0f} GB/s, GEMM {gemm:,.0f} GFLOP/s", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("GFLOP/s reached")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    caption = (
        "Cases that count FLOPs, under the roof of the copy bandwidth and the GEMM rate measured in this run "
        "(medians); a line joins the two of a case. FLOPs and bytes are the least that the case needs, for peers too, "
        "which may do more."
    )
    return Picture("roofline", "Roofline of what is bound by products", caption, figure)


def bandwidth(found: Sequence[Standing]) -> Picture | None:
    """Bytes a second reached, for the cases that count no FLOPs."""
    found = [standing for standing in found if standing.lfcc.bytes and not standing.lfcc.flops]
    found = sorted((s for s in found if s.lfcc.copy_gbps), key=lambda standing: _gbps(standing.lfcc))
    if not found:
        return None
    figure, axes = _lines(len(found))
    places = range(len(found))
    bars = axes.barh(places, [_gbps(standing.lfcc) for standing in found], color=OURS, height=0.7)
    fastest = [_gbps(standing.fastest) for standing in found]
    marks = axes.scatter(fastest, places, color=PEER, edgecolor="black", marker="D", s=28, zorder=3)
    copy = statistics.median(standing.lfcc.copy_gbps for standing in found)
    roof = axes.axvline(copy, color="black", linestyle="--", linewidth=1.2)
    axes.set(xlabel="GB/s of the bytes counted", xlim=(0, 1.05 * max(copy, *fastest, _gbps(found[-1].lfcc))))
    _name(axes, [title(standing.lfcc) for standing in found])
    names = ("ours", "fastest peer", f"copy bandwidth, {copy:,.0f} GB/s")
    figure.legend((bars, marks, roof), names, loc="outside lower center", ncols=3, frameon=False)
    caption = (
        "Cases that count bytes alone, slowest first: the least bytes that must move over the time taken, and the "
        "copy bandwidth measured in this run (median)."
    )
    return Picture("bandwidth", "Bandwidth of what is bound by memory", caption, figure)


def floors(rows: Sequence[Row]) -> Picture | None:
    """Bars of the fraction of the floor that ours reaches, by suite."""
    rows = [row for row in rows if row.candidate == "ours" and row.fraction_of_floor is not None]
    if not rows:
        return None
    suites: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.fraction_of_floor):
        suites[row.suite].append(row)
    counts = [len(some) for some in suites.values()]
    figure = Figure(figsize=(10, _LINE * sum(counts) + 0.4 * len(suites) + 0.8), layout="constrained")
    panels = figure.subplots(len(suites), 1, sharex=True, squeeze=False, height_ratios=counts)[:, 0]
    for axes, (suite, some) in zip(panels, suites.items(), strict=True):
        bars = axes.barh(range(len(some)), [100 * row.fraction_of_floor for row in some], color=OURS, height=0.7)
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8, bbox={"color": "white", "pad": 0.6})
        for place, row in enumerate(some):
            for goal in TARGETS:
                if (goal.metric, goal.cases) == ("floor", (row.case,)) and row.run in goal.runs:
                    axes.plot((goal.bound,) * 2, (place - 0.45, place + 0.45), color=GOAL, linewidth=2.5)
        axes.axvline(100, color="black", linestyle="--", linewidth=1.2)
        axes.set_title(suite, fontsize=10, loc="left")
        _name(axes, [title(row) for row in some])
    panels[-1].set(xlabel="% of the floor", xlim=(0, 110 * max(1, *(row.fraction_of_floor for row in rows))))
    caption = (
        "The least time for the work counted, at the copy bandwidth and GEMM rate measured just before, over the time "
        "of ours: 100 % is the dashed line, a goal set for a case the short one. A machine whose rates change while "
        "it is measured can show more."
    )
    return Picture("floors", "How close ours is to the floor", caption, figure)


def _lines(cases: int) -> tuple[Figure, Axes]:
    """A figure as high as its cases need."""
    figure = Figure(figsize=(10, _LINE * cases + 1.2), layout="constrained")
    return figure, figure.subplots()


def _name(axes: Axes, names: Sequence[str]) -> None:
    """One line a name, the first on top."""
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _factors(axes: Axes) -> None:
    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high / low < 500 else (1,)
    shown = [x for x in (step * 10.0**decade for decade in range(-4, 5) for step in steps) if low <= x <= high]
    axes.set_xticks(shown, [f"{x:g}x" for x in shown])
    axes.set_xticks([], minor=True)


def _gflops(row: Row) -> float:
    return row.flops / row.median_ms / 1e6


def _gbps(row: Row) -> float:
    return row.bytes / row.median_ms / 1e6
