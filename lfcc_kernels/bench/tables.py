"""Tables of a record, for Markdown and for the HTML report. Cases in which lfcc is slower come first everywhere."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lfcc_kernels.bench import record
from lfcc_kernels.bench.record import Row
from lfcc_kernels.bench.targets import TARGETS
from lfcc_kernels.files import write_file

Table = list[dict[str, str]]  # one dict per line, all with the same keys

SLOWER, FASTER = "Slower than the fastest peer", "Faster than the fastest peer"
MEMORY = "Peak memory beyond inputs, results and gradients (MiB)"
NOTES = (
    "Times are medians of interleaved rounds, with the 20 % and 80 % quantiles.",
    "Speedup over fastest peer: time of the fastest other implementation, eager included, over the time of lfcc. Below "
    "1x lfcc is slower. It excludes the conversion of that peer's inputs and gradients, which has its own column.",
    "Fraction of floor: the floor is the least time for the counted work at the copy bandwidth and GEMM rate measured "
    "just before; the fraction is floor / time, median over rounds. The rate is that of the counted bytes or FLOPs, "
    "whichever bounds the floor.",
    "Error: largest deviation of result and gradients from eager in float64, relative to the largest value of each. "
    "* marks a reference in the case's own dtype, used if float64 would need too much memory.",
    "Work counted: X, S and T are the bytes of the map, of the student's maps and of the teacher's maps, Y those of "
    "the pyramids; B rows of D values; s x s cells of C_s or C_t channels.",
)
GPU_NOTE = (
    "GPU times are device times with all launches enqueued beforehand; the overhead suite reports host times. Below 50 "
    "us, replays of captured CUDA graphs are timed."
)


@dataclass(frozen=True)
class Ranking:
    """The timed candidates of one case in one run: lfcc, at least one peer, and lfcc on other backends."""

    lfcc: Row
    peers: tuple[Row, ...]
    others: tuple[Row, ...] = ()

    @property
    def fastest(self) -> Row:
        """The fastest peer, eager included, by its time without conversion."""
        return min(self.peers, key=lambda row: row.median_ms)

    @property
    def speedup(self) -> float:
        """Time of the fastest peer over time of lfcc."""
        return self.fastest.median_ms / self.lfcc.median_ms

    @property
    def speedup_text(self) -> str:
        """The speedup as "2.5x", rounded down below 1 so that no loss reads as a draw."""
        return f"{math.floor(1000 * self.speedup) / 1000 if self.speedup < 1 else self.speedup:.3g}x"


def rankings(rows: Iterable[Row]) -> list[Ranking]:
    """The cases in which lfcc and a peer were timed, by increasing speedup."""
    cases: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.median_ms is not None:
            cases[row.run, row.case].append(row)
    found = []
    for timed in cases.values():
        lfcc = [row for row in timed if row.candidate == "lfcc"]
        peers = tuple(row for row in timed if row.peer)
        if lfcc and peers:
            others = tuple(row for row in timed if row.is_lfcc and row.candidate != "lfcc")
            found.append(Ranking(lfcc[0], peers, others))
    return sorted(found, key=lambda ranking: ranking.speedup)


def title(row: Row) -> str:
    """The case of a row in words."""
    return f"{row.suite} {row.label} {'x'.join(map(str, row.shape))} {row.dtype} {row.mode}"


def markdown(results: dict) -> str:
    """All tables of a record under "###" headings; begins with `overview`."""
    _, faster = times(results)
    tables = {FASTER: faster, MEMORY: memory(results), "Not timed": not_timed(results)}
    return "\n\n".join([overview(results), *(f"### {head}\n\n{markdown_table(t)}" for head, t in tables.items())])


def overview(results: dict) -> str:
    """The part of the tables that docs/benchmarks.md shows: machine, slower cases, targets, and notes."""
    slower, _ = times(results)
    sections = [
        *facts(results),
        f"### {SLOWER}\n\n{summary(results)}\n\n{markdown_table(slower)}",
        f"### Targets\n\n{markdown_table(targets(results))}",
        "\n".join(f"- {note}" for note in notes(results)),
    ]
    return "\n\n".join(sections)


def facts(results: dict) -> list[str]:
    """One line per run: device, measured ceilings, load, and versions."""
    sizes = {"quick": " Quick run with few cases.", "tiny": " Smoke test with tiny shapes: the times are meaningless."}
    size = sizes.get(record.request(results).size, "")
    names = {"default": "Default heap", "kept": "Kept heap", "cuda": "GPU"}
    return [
        f"{names.get(name, name)}: {_fact(name, run['environment'], record.rows_of(run))}{size}"
        for name, run in results["runs"].items()
    ]


def notes(results: dict) -> list[str]:
    """How to read the tables."""
    return [*NOTES, *([GPU_NOTE] if "cuda" in results["runs"] else [])]


def summary(results: dict) -> str:
    """In how many cases lfcc is slower."""
    speedups = [ranking.speedup for ranking in rankings(record.rows(results))]
    return f"lfcc is slower than the fastest peer in {sum(s < 1 for s in speedups)} of {len(speedups)} cases."


def times(results: dict) -> tuple[Table, Table]:
    """The cases in which lfcc is slower, worst first, and all others; empty columns are left out."""
    found = rankings(record.rows(results))
    lines = [{head: text(ranking) for head, text in COLUMNS.items()} for ranking in found]
    if len(results["runs"]) > 1:
        lines = [{"case": line["case"], "run": r.lfcc.run, **line} for r, line in zip(found, lines, strict=True)]
    slower = sum(ranking.speedup < 1 for ranking in found)
    return _used(lines[:slower]), _used(lines[slower:])


def targets(results: dict) -> Table:
    """The targets of these runs: missed ones first, those that were not measured last."""
    lines = []
    for run in results["runs"]:
        measured = {(row.case, row.candidate): row for row in record.rows(results) if row.run == run}
        lines += [{"what": t.what, "run": run, **t.verdict(measured)} for t in TARGETS if run in t.runs]
    return sorted(lines, key=lambda line: ("no", "yes", "").index(line["met"]))


def memory(results: dict) -> Table:
    """Peak memory of every candidate for which it was measured."""
    cases: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in record.rows(results):
        if row.peak_memory_bytes is not None:
            cases[row.run, row.case].append(row)
    return [
        {
            "case": title(rows[0]),
            "lfcc": "; ".join(_mebibytes(row) for row in rows if row.is_lfcc),
            "peers": "; ".join(_mebibytes(row) for row in rows if row.peer),
        }
        for rows in cases.values()
    ]


def not_timed(results: dict) -> Table:
    """Candidates without a time and the reason: wrong and failed ones before skipped ones."""
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in record.rows(results):
        if row.status != "ok":
            found[row.status, row.run, row.name, row.note].append(row)
    return [
        {
            "candidate": name,
            "run": run,
            "status": status,
            "reason": reason,
            "cases": f"{len(rows)} cases"
            if status == "skipped" and len(rows) > 3
            else "; ".join(title(row) + _text(row.error, " (error {:.1e})") for row in rows),
        }
        for (status, run, name, reason), rows in sorted(
            found.items(), key=lambda item: ("wrong", "failed", "skipped").index(item[0][0])
        )
    ]


def save(path: Path, results: dict) -> Path:
    """Write the tables as Markdown next to the record at `path`; returns their path."""
    target = path.with_suffix(".md")
    write_file(target, f"{markdown(results)}\n")
    return target


def _used(table: Table) -> Table:
    """The columns that are not empty everywhere."""
    return [{head: line[head] for head in line if any(other[head] for other in table)} for line in table]


def _fact(name: str, env: dict, rows: Sequence[Row]) -> str:
    if not env:
        return "nothing was measured; the process ended before its first case."
    packages, dtypes = [], {"float32": rows}
    if name == "cuda":
        cache = f"L2 {env['last_cache_bytes'] / 2**20:.0f} MiB"
        smi = f"nvidia-smi ({env['nvidia_smi_fields']}): {env['nvidia_smi'] or 'not available'}"
        machine = f"{env['device']}, {env['multiprocessors']} multiprocessors, {cache}; {smi}"
        packages = [f"CUDA {env['cuda']}", *(f"{package} {version}" for package, version in env["packages"].items())]
        dtypes = {dtype: [row for row in rows if row.dtype == dtype] for dtype in sorted({row.dtype for row in rows})}
    else:
        machine = f"{env['device']}, {env['cores']} cores, {env['threads']} threads, {env['cpu_capability']}"
    gemm = (f"{_span([row.gemm_gflops for row in some])} GFLOP/s in {dtype}" for dtype, some in dtypes.items())
    versions = [f"torch {env['torch']}", f"lfcc_kernels {env['lfcc_kernels']} {env['commit']}", *packages]
    return (
        f"{machine}; copy {_span([row.copy_gbps for row in rows])} GB/s; GEMM {', '.join(gemm)}; "
        f"clock {_span([row.clock_mhz for row in rows])} MHz; "
        f"load average {_span([row.load_average for row in rows], '.1f')}; {', '.join(versions)}; "
        f"backends {', '.join(env['backends'])}; {env['started']}."
    )


def _span(values: Sequence[float | None], form: str = ".0f") -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):{form}} to {max(known):{form}}" if known else "?"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _floor(row: Row) -> str:
    """The fraction, and the rate of the work that bounds the floor."""
    if row.fraction_of_floor is None:
        return ""
    bound_by_flops = row.flops / row.gemm_gflops > row.bytes / row.copy_gbps
    work, unit = (row.flops, "FLOP/s") if bound_by_flops else (row.bytes, "B/s")
    rate = work / (row.median_ms / 1e3)
    text = f"{rate / 1e12:.3g} T{unit}" if rate >= 1e12 else f"{rate / 1e9:.3g} G{unit}"
    return f"{row.fraction_of_floor:.0%}, {text}"


def _lfcc_and_eager(ranking: Ranking, text: Callable[[Row], str]) -> str:
    texts = [text(row) for row in (ranking.lfcc, *ranking.peers) if row.candidate in ("lfcc", "eager")]
    return " / ".join(texts) if any(texts) else ""


def _error(row: Row) -> str:
    return _text(row.error, "{:.0e}" if row.reference == "float64" else "{:.0e}*")


def _mebibytes(row: Row) -> str:
    mebibytes = f"{row.peak_memory_bytes / 2**20:.1f}"
    return mebibytes if row.candidate == "lfcc" else f"{row.candidate.removeprefix('lfcc, ')} {mebibytes}"


def markdown_table(table: Table) -> str:
    if not table:
        return "None."
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(line.values()) for line in table)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


COLUMNS: dict[str, Callable[[Ranking], str]] = {
    "case": lambda r: title(r.lfcc),
    "lfcc, ms (20 to 80 %)": lambda r: "{} ({} to {})".format(
        *map(_number, (r.lfcc.median_ms, r.lfcc.q20_ms, r.lfcc.q80_ms))
    ),
    "speedup over fastest peer": lambda r: f"{r.speedup_text} {r.fastest.name}, {_number(r.fastest.median_ms)} ms",
    "conversion for that peer": lambda r: (
        "" if r.fastest.conversion_ms is None else f"{r.fastest.conversion}, {_number(r.fastest.conversion_ms)} ms"
    ),
    "speedup over eager": lambda r: _text(r.lfcc.speedup_over_eager, "{:.2g}x"),
    "fraction of floor": lambda r: _floor(r.lfcc),
    "by backend, ms": lambda r: ", ".join(
        f"{row.backend} {_number(row.median_ms)}" for row in (r.lfcc, *r.others) if r.others
    ),
    "share of step, lfcc / eager": lambda r: _lfcc_and_eager(r, lambda row: _text(row.share_of_step, "{:.1%}")),
    "error, lfcc / eager": lambda r: _lfcc_and_eager(r, _error),
    "work counted": lambda r: r.lfcc.formula,
}
