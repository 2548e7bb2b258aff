"""The Markdown tables of a results file: `python -m benchmarks.report RESULTS.json`."""

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.goals import GOALS, GPU, HEAPS, Goal
from benchmarks.record import Row

Contest = dict[str, Row]  # the rows of one case in one run, by candidate

COUNTED = """\
Of floor: the least
time for the work counted, at the copy bandwidth and GEMM rate measured just before, over ours: the median of
rounds. Counted: X, S, T bytes of the map, of the student's and of the teacher's maps, Y of the pyramids; B rows
of D values; s x s cells of C_s or C_t channels. Fastest peer: the best of all that is not ours, eager
included; below 1x ours loses."""

NOTES = f"""\
Median of interleaved rounds with the 20 and 80 % quantiles, default heap / kept heap. {COUNTED}"""

GPU_NOTES = f"""\
Median of interleaved rounds with the 20 and 80 % quantiles, in time of the device, whose host is ahead by then; of
the overhead cases, in time of the host. Where something takes under 50 us, replays of captured calls. Rate: of
the bytes or of the FLOPs counted, whichever bound the floor. Error: the largest of result and gradients against
float64, over the largest value. {COUNTED}"""


def report(results: dict) -> str:
    """All tables of a results file."""
    rows = record.rows(results)
    gpu = GPU[0] in results["runs"]
    runs, notes, columns = (GPU, GPU_NOTES, GPU_COLUMNS) if gpu else (HEAPS, NOTES, COLUMNS)
    sections = [
        *(_gpu(run) if gpu else _heap(heap, run) for heap, run in results["runs"].items()),
        f"### Must reach\n\n{_goal_table(rows, runs)}",
        f"### Times, losing cases first\n\n{notes}\n\n{_time_table(rows, runs, columns)}",
        f"### Peak memory beyond inputs, results and gradients, MiB\n\n{_memory_table(rows)}",
        _left_out(rows),
    ]
    return "\n\n".join(section for section in sections if section)


def _heap(heap: str, run: dict) -> str:
    env = run["environment"]
    return (
        f"{heap.capitalize()} heap: {env['device']}, {env['cores']} cores, {env['threads']} threads, "
        f"{env['cpu_capability']}; copy {_span(run, 'copy_gbps')} GB/s, "
        f"GEMM {_span(run, 'gemm_gflops')} GFLOP/s; {_versions(env)}"
    )


def _gpu(run: dict) -> str:
    env = run["environment"]
    if not env:
        return "Nothing was measured: the process ended before its first case."
    dtypes = sorted({row["dtype"] for row in run["rows"]})
    gemm = ", ".join(f"{_span(run, 'gemm_gflops', dtype, 1e3)} in {dtype}" for dtype in dtypes)
    packages = "".join(f", {name} {version}" for name, version in env["packages"].items())
    return (
        f"{env['device']}, {env['multiprocessors']} multiprocessors, L2 {env['last_cache_bytes'] / 2**20:.0f} MiB; "
        f"copy {_span(run, 'copy_gbps')} GB/s, GEMM {gemm} TFLOP/s; nvidia-smi ({env['nvidia_smi_fields']}): "
        f"{env['nvidia_smi'] or 'not available'}; CUDA {env['cuda']}{packages}, {_versions(env)}"
    )


def _versions(env: dict) -> str:
    return (
        f"torch {env['torch']}, lfcc_kernels {env['lfcc_kernels']} {env['commit']}, backends "
        f"{', '.join(env['backends'])}; {env['started']}, load average {env['load_average']:.1f} at the start."
        + (" **Tiny shapes, a smoke test: the times mean nothing.**" if env["tiny"] else "")
    )


def _span(run: dict, rate: str, dtype: str | None = None, unit: float = 1) -> str:
    """Lowest to highest of a rate over the cases of a run, or over those of one dtype."""
    rates = [row[rate] / unit for row in run["rows"] if row[rate] is not None and dtype in (None, row["dtype"])]
    return f"{min(rates):.0f} to {max(rates):.0f}" if rates else "?"


def _goal_table(rows: Sequence[Row], runs: Sequence[str]) -> str:
    by_run = {run: {(row.case, row.candidate): row for row in rows if row.heap == run} for run in runs}
    lines = [[goal.what, run, *_verdict(goal, by_run[run])] for goal in GOALS for run in runs if run in goal.runs]
    return _table(["what", "heap", "must reach", "measured", "reached"], lines)


def _verdict(goal: Goal, rows: dict[tuple[str, str], Row]) -> list[str]:
    bound = f"{'>=' if goal.at_least else '<='} {goal.bound:g} {goal.unit}"
    try:
        measured = goal.measure(rows)
    except LookupError:
        return [bound, "not measured", ""]
    return [bound, f"{measured:.3g} {goal.unit}", "yes" if goal.reached(measured) else "**no**"]


def _time_table(rows: Sequence[Row], runs: Sequence[str], columns: dict[str, Callable[[Contest], str]]) -> str:
    cases: dict[str, list[Contest]] = defaultdict(list)
    for run in runs:
        contests: dict[str, Contest] = defaultdict(dict)
        for row in rows:
            if row.heap == run and row.median_ms is not None:
                contests[row.case][row.candidate] = row
        for name, contest in contests.items():
            if "ours" in contest and _peers(contest):
                cases[name].append(contest)
    by_margin = sorted(cases.values(), key=lambda contests: min(_margin(contest) for contest in contests))
    lines = [
        [
            _title(contests[0]["ours"]),
            *(" / ".join(text(contest) for contest in contests) for text in columns.values()),
            contests[0]["ours"].formula,
        ]
        for contests in by_margin
    ]
    return _table(["case", *columns, "counted"], lines)


def _memory_table(rows: Sequence[Row]) -> str:
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.peak_memory_bytes is not None:
            cases[row.case].append(row)
    lines = []
    for group in cases.values():
        ours, peers = ([row for row in group if (row.candidate == "ours") is mine] for mine in (True, False))
        texts = [f"{row.candidate} {_mebibytes(row)}" for row in peers]
        lines.append([_title(group[0]), ", ".join(map(_mebibytes, ours)), ", ".join(texts)])
    return _table(["case", "ours", "peers"], lines) if lines else "Not measured."


def _left_out(rows: Sequence[Row]) -> str:
    cases: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.status != "ok":
            run = f"{row.heap} heap, " if row.heap in HEAPS else ""
            cases[f"- {run}{row.candidate}: {row.status}, {row.note}"].append(_title(row))
    lines = [f"{why}: {'; '.join(those) if len(those) < 4 else f'{len(those)} cases'}" for why, those in cases.items()]
    return "### Not timed\n\n" + "\n".join(lines) if lines else ""


def _title(row: Row) -> str:
    return f"{row.suite} {row.label} ({', '.join(map(str, row.shape))}) {row.dtype} {row.mode}"


def _peers(contest: Contest) -> list[Row]:
    """All that is not ours, by whatever backend."""
    return [row for name, row in contest.items() if not name.startswith("ours")]


def _fastest_peer(contest: Contest) -> Row:
    return min(_peers(contest), key=lambda row: row.median_ms)


def _margin(contest: Contest) -> float:
    return _fastest_peer(contest).median_ms / contest["ours"].median_ms


def _times(row: Row) -> str:
    return f"{row.median_ms:.3g} ({row.q20_ms:.3g} to {row.q80_ms:.3g})"


def _factor(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2g}x"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def _rate(row: Row) -> str:
    """What bounds the floor, at the rate that ours has it done."""
    if row.copy_gbps is None or row.gemm_gflops is None:
        return ""
    seconds = row.median_ms / 1e3
    if row.flops / row.gemm_gflops > row.bytes / row.copy_gbps:
        return f"{row.flops / seconds / 1e12:.3g} TFLOP/s"
    return f"{row.bytes / seconds / 1e9:.4g} GB/s"


def _other_backends(contest: Contest) -> str:
    """Ours by the backends that `auto` did not take, with the fraction of the floor."""
    others = [(name.removeprefix("ours, "), row) for name, row in contest.items() if name.startswith("ours, ")]
    return ", ".join(f"{name} {row.median_ms:.3g} {_percent(row.fraction_of_floor)}".rstrip() for name, row in others)


def _error(contest: Contest) -> str:
    errors = [contest[name].error for name in ("ours", "eager") if name in contest]
    return " / ".join("" if error is None else f"{error:.0e}" for error in errors)


def _mebibytes(row: Row) -> str:
    return "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:.1f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


COLUMNS: dict[str, Callable[[Contest], str]] = {
    "ours, ms (20 to 80 %)": lambda c: _times(c["ours"]),
    "of floor": lambda c: _percent(c["ours"].fraction_of_floor),
    "over eager": lambda c: _factor(c["ours"].speedup_over_eager),
    "over fastest peer": lambda c: f"{_factor(_margin(c))} {_fastest_peer(c).candidate}",
}
GPU_COLUMNS = COLUMNS | {
    "other backends, ms": _other_backends,
    "rate": lambda c: _rate(c["ours"]),
    "peak memory, MiB": lambda c: _mebibytes(c["ours"]),
    "error, ours / eager": _error,
}

if __name__ == "__main__":
    print(report(record.load(Path(sys.argv[1]))))
