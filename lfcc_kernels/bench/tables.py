"""The tables of a record, as text for Markdown and for the page: losing cases come first everywhere."""

from collections import defaultdict
from collections.abc import Callable, Sequence

from lfcc_kernels.bench import record
from lfcc_kernels.bench.goals import GOALS, Goal
from lfcc_kernels.bench.record import Row
from lfcc_kernels.bench.standing import Standing, standings, title

Table = list[dict[str, str]]  # lines under the same heads; empty where there is nothing to show

NOTES = (
    "Times: median of interleaved rounds, with the 20 and 80 % quantiles.",
    "Over fastest peer: the best of all that is not ours, eager included, by its own time alone: what its user must "
    "convert first is not in it, so this is its best light. Conversion: what that would cost, and the way back of "
    "the gradients. Below 1x ours loses.",
    "Of floor: the least time for the work counted, at the copy bandwidth and GEMM rate measured just before, over "
    "ours, as the median of rounds; then the rate of the bytes or of the FLOPs counted, whichever bound the floor.",
    "Error: the largest deviation of result and gradients from eager in float64, over the largest value of each; "
    "* marks one from eager in the case's own dtype, where float64 would take too much memory.",
    "Counted: X, S, T bytes of the map, of the student's and of the teacher's maps, Y of the pyramids; B rows of D "
    "values; s x s cells of C_s or C_t channels.",
)
GPU_NOTE = (
    "Time is that of the device, whose host is ahead by then, and in the overhead cases that of the host. Where "
    "something takes under 50 us, replays of captured calls are timed."
)


def markdown(results: dict) -> str:
    """All tables of a record, with "###" heads, what `readme` has first."""
    _, others = times(results)
    sections = [
        readme(results),
        f"### Other cases\n\n{_markdown_table(others)}",
        f"### Peak memory beyond inputs, results and gradients, MiB\n\n{_markdown_table(memory(results))}",
        f"### Not timed\n\n{_markdown_table(left_out(results))}",
    ]
    return "\n\n".join(sections)


def readme(results: dict) -> str:
    """What the README shows of a record: where it ran, losing cases first, what was to be reached, how to read it."""
    losing, _ = times(results)
    sections = [
        *facts(results),
        f"### Losing cases, worst first\n\n{summary(results)}\n\n{_markdown_table(losing)}",
        f"### Must reach\n\n{_markdown_table(goals(results))}",
        "\n".join(f"- {note}" for note in notes(results)),
    ]
    return "\n\n".join(sections)


def facts(results: dict) -> list[str]:
    """One line a run: the device, what it reached and under which load, and what ran on it."""
    sizes = {"quick": " A quick run, of few cases.", "tiny": " Tiny shapes, a smoke test: the times mean nothing."}
    size = sizes.get(record.request(results).size, "")
    return [
        f"{_run_name(name)}: {_fact(name, run['environment'], record.rows_of(run))}{size}"
        for name, run in results["runs"].items()
    ]


def notes(results: dict) -> list[str]:
    """How the tables are to be read."""
    return [*NOTES, *([GPU_NOTE] if "cuda" in results["runs"] else [])]


def summary(results: dict) -> str:
    """How many cases ours loses."""
    margins = [standing.margin for standing in standings(record.rows(results))]
    lost = sum(margin < 1 for margin in margins)
    return f"Ours loses {lost} of {len(margins)} cases to its fastest peer."


def times(results: dict) -> tuple[Table, Table]:
    """The cases that ours loses, worst first, and all others, each without the columns that would be empty."""
    found = standings(record.rows(results))
    lines = [{head: text(standing) for head, text in COLUMNS.items()} for standing in found]
    if len(results["runs"]) > 1:
        lines = [{"case": line["case"], "run": s.ours.run, **line} for s, line in zip(found, lines, strict=True)]
    lost = sum(standing.margin < 1 for standing in found)
    return _used(lines[:lost]), _used(lines[lost:])


def goals(results: dict) -> Table:
    """The bounds that were set for these runs; what is not reached comes first, what was not measured last."""
    rows = record.rows(results)
    lines = []
    for run in results["runs"]:
        measured = {(row.case, row.candidate): row for row in rows if row.run == run}
        lines += [{"what": goal.what, "run": run, **_verdict(goal, measured)} for goal in GOALS if run in goal.runs]
    return sorted(lines, key=lambda line: ("no", "yes", "").index(line["reached"]))


def memory(results: dict) -> Table:
    """Peak memory of every candidate where it was measured."""
    cases: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in record.rows(results):
        if row.peak_memory_bytes is not None:
            cases[row.run, row.case].append(row)
    return [
        {
            "case": title(rows[0]),
            "ours": "; ".join(_mebibytes(row) for row in rows if row.ours),
            "peers": "; ".join(_mebibytes(row) for row in rows if row.peer),
        }
        for rows in cases.values()
    ]


def left_out(results: dict) -> Table:
    """What was not timed and why; wrong and failed ones come before those that were skipped."""
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in record.rows(results):
        if row.status != "ok":
            found[row.status, row.run, row.candidate, row.note].append(row)
    ordered = sorted(found.items(), key=lambda item: ("wrong", "failed", "skipped").index(item[0][0]))
    return [
        {
            "candidate": candidate,
            "run": run,
            "status": status,
            "reason": reason,
            "cases": f"{len(rows)} cases" if status == "skipped" and len(rows) > 3 else "; ".join(map(_case, rows)),
        }
        for (status, run, candidate, reason), rows in ordered
    ]


def _used(table: Table) -> Table:
    """The columns in which a line has something."""
    return [{head: line[head] for head in line if any(other[head] for other in table)} for line in table]


def _run_name(name: str) -> str:
    return {"default": "Default heap", "kept": "Kept heap", "cuda": "GPU"}.get(name, name)


def _fact(name: str, env: dict, rows: Sequence[Row]) -> str:
    if not env:
        return "nothing was measured, the process ended before its first case."
    if name == "cuda":
        machine = [
            f"{env['device']}, {env['multiprocessors']} multiprocessors, L2 {env['last_cache_bytes'] / 2**20:.0f} MiB",
            f"nvidia-smi ({env['nvidia_smi_fields']}): {env['nvidia_smi'] or 'not available'}",
        ]
        packages = [f"CUDA {env['cuda']}", *(f"{package} {version}" for package, version in env["packages"].items())]
        gemms = {dtype: [row for row in rows if row.dtype == dtype] for dtype in sorted({row.dtype for row in rows})}
    else:
        machine = [f"{env['device']}, {env['cores']} cores, {env['threads']} threads, {env['cpu_capability']}"]
        packages, gemms = [], {"float32": rows}
    gemm = [f"{_span([row.gemm_gflops for row in some])} GFLOP/s in {dtype}" for dtype, some in gemms.items()]
    versions = [f"torch {env['torch']}", f"lfcc_kernels {env['lfcc_kernels']} {env['commit']}", *packages]
    return "; ".join(
        [
            *machine,
            f"copy {_span([row.copy_gbps for row in rows])} GB/s",
            f"GEMM {', '.join(gemm)}",
            f"clock {_span([row.clock_mhz for row in rows])} MHz",
            f"load average {_span([row.load_average for row in rows], '.1f')}",
            ", ".join(versions),
            f"backends {', '.join(env['backends'])}",
            f"{env['started']}.",
        ]
    )


def _span(values: Sequence[float | None], form: str = ".0f") -> str:
    """Lowest to highest."""
    known = [value for value in values if value is not None]
    return f"{min(known):{form}} to {max(known):{form}}" if known else "?"


def _verdict(goal: Goal, rows: dict[tuple[str, str], Row]) -> dict[str, str]:
    bound = f"{'>=' if goal.at_least else '<='} {goal.bound:g} {goal.unit}"
    try:
        measured = goal.measure(rows)
    except LookupError:
        return {"must reach": bound, "measured": "not measured", "reached": ""}
    reached = "yes" if goal.reached(measured) else "no"
    return {"must reach": bound, "measured": f"{measured:.3g} {goal.unit}", "reached": reached}


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _times(standing: Standing) -> str:
    ours = standing.ours
    return f"{_number(ours.median_ms)} ({_number(ours.q20_ms)} to {_number(ours.q80_ms)})"


def _floor(standing: Standing) -> str:
    ours = standing.ours
    return "" if ours.fraction_of_floor is None else f"{ours.fraction_of_floor:.0%}, {_rate(ours)}"


def _rate(row: Row) -> str:
    """What bounds the floor, at the rate that it is done."""
    bound_by_flops = row.flops / row.gemm_gflops > row.bytes / row.copy_gbps
    work, unit = (row.flops, "FLOP/s") if bound_by_flops else (row.bytes, "B/s")
    rate = work / (row.median_ms / 1e3)
    return f"{rate / 1e12:.3g} T{unit}" if rate >= 1e12 else f"{rate / 1e9:.3g} G{unit}"


def _over_fastest(standing: Standing) -> str:
    return f"{standing.factor} {standing.fastest.candidate}, {_number(standing.fastest.median_ms)} ms"


def _conversion(standing: Standing) -> str:
    fastest = standing.fastest
    return "" if fastest.conversion_ms is None else f"{fastest.conversion}, {_number(fastest.conversion_ms)} ms"


def _backends(standing: Standing) -> str:
    """Ours by every backend that was timed, where there is more than the one that `auto` takes."""
    rows = (standing.ours, *standing.others) if standing.others else ()
    return ", ".join(f"{row.backend} {_number(row.median_ms)}" for row in rows)


def _over_eager(standing: Standing) -> str:
    speedup = standing.ours.speedup_over_eager
    return "" if speedup is None else f"{speedup:.2g}x"


def _of_ours_and_eager(text: Callable[[Row], str]) -> Callable[[Standing], str]:
    def both(standing: Standing) -> str:
        texts = [text(row) for row in (standing.ours, standing.eager) if row]
        return " / ".join(texts) if any(texts) else ""

    return both


def _error(row: Row) -> str:
    return "" if row.error is None else f"{row.error:.0e}" + ("" if row.reference == "float64" else "*")


def _share(row: Row) -> str:
    return "" if row.share_of_step is None else f"{row.share_of_step:.1%}"


def _mebibytes(row: Row) -> str:
    mebibytes = f"{row.peak_memory_bytes / 2**20:.1f}"
    return mebibytes if row.candidate == "ours" else f"{row.candidate.removeprefix('ours, ')} {mebibytes}"


def _case(row: Row) -> str:
    return title(row) + ("" if row.error is None else f" (error {row.error:.1e})")


def _markdown_table(table: Table) -> str:
    if not table:
        return "None."
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(line.values()) for line in table)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


COLUMNS: dict[str, Callable[[Standing], str]] = {
    "case": lambda standing: title(standing.ours),
    "ours, ms (20 to 80 %)": _times,
    "over fastest peer": _over_fastest,
    "its conversion": _conversion,
    "over eager": _over_eager,
    "of floor": _floor,
    "by backend, ms": _backends,
    "share of step, ours / eager": _of_ours_and_eager(_share),
    "error, ours / eager": _of_ours_and_eager(_error),
    "counted": lambda standing: standing.ours.formula,
}
