"""The Markdown tables of a results file: `python -m benchmarks.report RESULTS.json`."""

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.goals import GOALS, HEAPS, Goal
from benchmarks.record import Row

Contest = dict[str, Row]  # the rows of one case under one heap, by candidate

NOTES = """\
Median of interleaved rounds with the 20 and 80 % quantiles, default heap / kept heap. Of floor: the least
time for the work counted, at the copy bandwidth and GEMM rate measured just before, over ours: the median of
rounds. Counted: X, S, T bytes of the map, of the student's and of the teacher's maps, Y of the pyramids; B rows
of D values; s x s cells of C_s or C_t channels. Fastest peer: the best of all that is not ours, eager
included; below 1x ours loses."""


def report(results: dict) -> str:
    """All tables of a results file."""
    rows = record.rows(results)
    sections = [
        *_machines(results),
        f"### Must reach\n\n{_goal_table(rows)}",
        f"### Times, losing cases first\n\n{NOTES}\n\n{_time_table(rows)}",
        f"### Peak memory beyond inputs, results and gradients, MiB\n\n{_memory_table(rows)}",
        _left_out(rows),
    ]
    return "\n\n".join(section for section in sections if section)


def _machines(results: dict) -> list[str]:
    lines = []
    for heap, run in results["runs"].items():
        env = run["environment"]
        lines.append(
            f"{heap.capitalize()} heap: {env['device']}, {env['cores']} cores, {env['threads']} threads, "
            f"{env['cpu_capability']}; copy {_span(run, 'copy_gbps')} GB/s, "
            f"GEMM {_span(run, 'gemm_gflops')} GFLOP/s; torch {env['torch']}, lfcc_kernels "
            f"{env['lfcc_kernels']} {env['commit']}, backends {', '.join(env['backends'])}; "
            f"{env['started']}, load average {env['load_average']:.1f} at the start."
            + (" **Tiny shapes, a smoke test: the times mean nothing.**" if env["tiny"] else "")
        )
    return lines


def _span(run: dict, rate: str) -> str:
    """Lowest to highest of a rate over the cases of a run."""
    rates = [row[rate] for row in run["rows"] if row[rate] is not None]
    return f"{min(rates):.0f} to {max(rates):.0f}" if rates else "?"


def _goal_table(rows: Sequence[Row]) -> str:
    by_heap = {heap: {(row.case, row.candidate): row for row in rows if row.heap == heap} for heap in HEAPS}
    lines = [[goal.what, heap, *_verdict(goal, by_heap[heap])] for goal in GOALS for heap in goal.heaps]
    return _table(["what", "heap", "must reach", "measured", "reached"], lines)


def _verdict(goal: Goal, rows: dict[tuple[str, str], Row]) -> list[str]:
    bound = f"{'>=' if goal.at_least else '<='} {goal.bound:g} {goal.unit}"
    try:
        measured = goal.measure(rows)
    except LookupError:
        return [bound, "not measured", ""]
    return [bound, f"{measured:.3g} {goal.unit}", "yes" if goal.reached(measured) else "**no**"]


def _time_table(rows: Sequence[Row]) -> str:
    cases: dict[str, list[Contest]] = defaultdict(list)
    for heap in HEAPS:
        contests: dict[str, Contest] = defaultdict(dict)
        for row in rows:
            if row.heap == heap and row.median_ms is not None:
                contests[row.case][row.candidate] = row
        for name, contest in contests.items():
            cases[name].append(contest)

    def cells(contests: list[Contest], text: Callable[[Contest], str]) -> str:
        return " / ".join(text(contest) for contest in contests)

    by_margin = sorted(cases.values(), key=lambda contests: min(_margin(contest) for contest in contests))
    lines = [
        [
            _title(contests[0]["ours"]),
            cells(contests, lambda c: _times(c["ours"])),
            cells(contests, lambda c: _percent(c["ours"].fraction_of_floor)),
            cells(contests, lambda c: _factor(c["ours"].speedup_over_eager)),
            cells(contests, lambda c: f"{_factor(_margin(c))} {_fastest_peer(c).candidate}"),
            contests[0]["ours"].formula,
        ]
        for contests in by_margin
    ]
    head = ["case", "ours, ms (20 to 80 %)", "of floor", "over eager", "over fastest peer", "counted"]
    return _table(head, lines)


def _memory_table(rows: Sequence[Row]) -> str:
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.peak_memory_bytes is not None:
            cases[row.case].append(row)
    lines = []
    for group in cases.values():
        ours, *peers = [f"{row.candidate} {row.peak_memory_bytes / 2**20:.1f}" for row in group]
        lines.append([_title(group[0]), ours.removeprefix("ours "), ", ".join(peers)])
    return _table(["case", "ours", "peers"], lines) if lines else "Not measured."


def _left_out(rows: Sequence[Row]) -> str:
    lines = [
        f"- {_title(row)}, {row.heap} heap, {row.candidate}: {row.status}, {row.note}"
        for row in rows
        if row.status != "ok"
    ]
    return "### Not timed\n\n" + "\n".join(lines) if lines else ""


def _title(row: Row) -> str:
    return f"{row.suite} {row.label} ({', '.join(map(str, row.shape))}) {row.dtype} {row.mode}"


def _fastest_peer(contest: Contest) -> Row:
    return min((row for name, row in contest.items() if name != "ours"), key=lambda row: row.median_ms)


def _margin(contest: Contest) -> float:
    return _fastest_peer(contest).median_ms / contest["ours"].median_ms


def _times(row: Row) -> str:
    return f"{row.median_ms:.3g} ({row.q20_ms:.3g} to {row.q80_ms:.3g})"


def _factor(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2g}x"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


if __name__ == "__main__":
    print(report(record.load(Path(sys.argv[1]))))
