"""Writes the table by which `auto` selects a backend (ops/dispatch.json) from records: `lfcc bench --dispatch RECORD`.

Compares the times of lfcc on every backend, in all modes of the cases that measure one op alone, on a GPU or with the
default heap of a CPU. For each device, op and dtype the table gets the rule with the least geometric mean of the cases'
times. A rule is one backend, or one up to a measured size and another above it if that reduces the mean by more than
3 %. A backend that was not "ok" in a case is not selected at its size. Eager stores the matrix of all pairs of rows,
which lfcc never does, so `info_nce` uses it only up to 2^18 pairs. float64 keeps the fixed order.

The table selects the backend. The Triton kernels select their algorithm and tiles by their own tables
(backends/triton/tables), which `lfcc bench --tune` writes.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lfcc_kernels.backends.native import PACKAGE
from lfcc_kernels.bench import record
from lfcc_kernels.bench.record import Row
from lfcc_kernels.files import write_file
from lfcc_kernels.ops.dispatch import TABLE

RUNS = ("default", "cuda")
MAX_PAIRS_OF_EAGER = 2**18  # a matrix of 1 MiB in float32
LEAST_GAIN_OF_CROSSOVER = 1.03

Times = dict[str, float]  # milliseconds by backend in one case; infinite if it failed
Group = list[tuple[int, Times]]  # the cases of one op and dtype, with their size
Rule = list[tuple[int | None, str]]  # upper bound of the size and backend, as in the table


def main(paths: Sequence[str | Path], output: str | Path | None = None) -> None:
    """Write the table from these records and print the changes.

    Entries that the records did not measure stay. If several records measured the same op and dtype on the same device,
    the last one counts.

    Args:
        paths: JSON files of `lfcc bench`.
        output: The table to write; by default the package's own.

    Raises:
        ValueError: a file is not a record of this version, has tiny cases, or none compares two backends of an op.
    """
    output = Path(output or TABLE)
    table = json.loads(output.read_text()) if output.exists() else {}
    measured = {key: lines for path in paths for key, lines in lines_of(path).items()}
    if not measured:
        raise ValueError(
            f"bench --dispatch: {', '.join(map(str, paths))} has no op measured on two backends; "
            "measure lowpass or info_nce without --backend on a machine with compiled kernels"
        )
    for (device, op, dtype), lines in measured.items():
        known = table.get(device, [])
        old = [line for line in known if (line["op"], line["dtype"]) == (op, dtype)]
        others = [line for line in known if line not in old]
        table[device] = sorted([*others, *lines], key=lambda line: (line["op"], line["dtype"]))
        before = "unchanged" if old == lines else f"before: {_describe(old) or 'the fixed order'}"
        print(f"{device} {op} {dtype}: {_describe(lines)} ({before})")
    write_file(output, f"{json.dumps(dict(sorted(table.items())), indent=1, allow_nan=False)}\n")
    print(f"wrote {output}")


def lines_of(path: str | Path) -> dict[tuple[str, str, str], list[dict]]:
    """The table's lines from one record, smallest bound first, by device, op and dtype."""
    results = record.load(path)
    if record.request(results).size == "tiny":
        raise ValueError(
            f"bench --dispatch: {path} was recorded with LFCC_BENCH_SIZE=tiny (a smoke test) and cannot be used; "
            "measure without LFCC_BENCH_SIZE"
        )
    lines = {}
    for run in (results["runs"][name] for name in RUNS if name in results["runs"]):
        capability = run["environment"].get("capability")
        device = f"sm_{capability.replace('.', '')}" if capability else "cpu"
        for (op, dtype), group in _groups(record.rows_of(run)).items():
            if rule := best_rule(op, group):
                lines[device, op, dtype] = _lines(op, dtype, rule, group, _relative(path))
    return lines


def best_rule(op: str, group: Group) -> Rule:
    """The backends to select, by size of the call; empty if only one was measured, or none works in every case."""
    backends = sorted({backend for _, times in group for backend in times})
    if len(backends) < 2:
        return []
    last = [backend for backend in backends if (op, backend) != ("info_nce", "eager")]
    single: list[Rule] = [[(None, backend)] for backend in last]
    double: list[Rule] = [
        [(size, below), (None, above)]
        for size in sorted({size for size, _ in group})[:-1]
        for above in last
        for below in backends
        if below != above and ((op, below) != ("info_nce", "eager") or size <= MAX_PAIRS_OF_EAGER)
    ]

    def mean(rule: Rule) -> float:
        return math.exp(sum(math.log(times.get(_selected(rule, size), math.inf)) for size, times in group) / len(group))

    best = min(single, key=mean)
    split = min(double, key=mean, default=best)
    best = split if mean(best) > LEAST_GAIN_OF_CROSSOVER * mean(split) else best
    return best if mean(best) < math.inf else []


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], Group]:
    """The times of lfcc by backend, case by case, without cases in which none was timed."""
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.op and row.is_lfcc and row.dtype != "float64":
            cases[row.case].append(row)
    groups: dict[tuple[str, str], Group] = defaultdict(list)
    for some in cases.values():
        times = {row.backend: math.inf if row.median_ms is None else row.median_ms for row in some}
        if min(times.values()) < math.inf:
            groups[some[0].op, some[0].dtype].append((some[0].size, times))
    return groups


def _lines(op: str, dtype: str, rule: Rule, group: Group, path: str) -> list[dict]:
    lines = []
    for bound, backend in rule:
        cases = [times for size, times in group if _selected(rule, size) == backend]
        worst = min(
            min((time for name, time in times.items() if name != backend), default=math.inf) / times[backend]
            for times in cases
        )
        worst = round(worst, 3) if worst < math.inf else None
        line = {"op": op, "dtype": dtype, "up_to": bound, "backend": backend}
        lines.append(line | {"record": path, "cases": len(cases), "worst": worst})
    return lines


def _selected(rule: Rule, size: int) -> str:
    return next(backend for bound, backend in rule if bound is None or size <= bound)


def _relative(path: str | Path) -> str:
    """The path of a record, relative to the root of the checkout if it lies inside."""
    path, root = Path(path).resolve(), PACKAGE.parent
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _describe(lines: Sequence[dict]) -> str:
    texts = []
    for line in lines:
        bound = f"up to size {line['up_to']} " if line["up_to"] else "above " if len(lines) > 1 else ""
        worst = "" if line["worst"] is None else f", at least {line['worst']}x as fast as the next"
        texts.append(f"{bound}{line['backend']} ({line['cases']} cases{worst}, {line['record']})")
    return "; ".join(texts)
