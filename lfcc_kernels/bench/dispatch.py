"""Writes the table by which `auto` chooses a backend (ops/dispatch.json) from records of the benchmark.

What is compared is ours by every backend that could serve, in all modes of the cases that measure one op alone, with
the default heap of a CPU or on a GPU. For each device, op and dtype the table gets the rule that makes the geometric
mean of the cases' times least. A rule is one backend, or one up to a size that was measured and another beyond it;
the second only where the mean is more than 3 % less. A backend that was not "ok" in a case serves no size of it.
Eager holds the matrix of all pairs of rows, which ours promises never to do, so it never serves `info_nce` beyond
2^18 of them. float64 is left to the fixed order.

This table says which backend serves. Which path and which tiles Triton takes then is said by its own tables
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
from lfcc_kernels.files import replace_file
from lfcc_kernels.ops.dispatch import TABLE

RUNS = ("default", "cuda")
MOST_PAIRS_OF_EAGER = 2**18  # a matrix of 1 MiB in float32
GAIN_OF_A_CROSSOVER = 1.03

Times = dict[str, float]  # of the backends in one case, ms; infinite where one cannot serve it
Group = list[tuple[int, Times]]  # the cases of one op and dtype, by size
Rule = list[tuple[int | None, str]]  # bound and backend, as in the table


def main(paths: Sequence[str | Path], output: str | Path | None = None) -> None:
    """Write the table of what these records measured, and print what changed.

    Lines of what they did not measure stay. Where several measured the same op and dtype on the same device, the last
    one counts.

    Args:
        paths: JSON files of `lfcc bench`.
        output: The table to write; the package's own where it is None.

    Raises:
        ValueError: a file is no record of this version, is of tiny cases, or none compares two backends in an op.
    """
    output = Path(output or TABLE)
    table = json.loads(output.read_text()) if output.exists() else {}
    measured = {key: lines for path in paths for key, lines in lines_of(path).items()}
    if not measured:
        raise ValueError(
            f"{', '.join(map(str, paths))}: no op was measured by two backends; "
            "measure lowpass or info_nce without --backend, where kernels are built"
        )
    for (device, op, dtype), lines in measured.items():
        known = table.get(device, [])
        old = [line for line in known if (line["op"], line["dtype"]) == (op, dtype)]
        others = [line for line in known if line not in old]
        table[device] = sorted([*others, *lines], key=lambda line: (line["op"], line["dtype"]))
        before = "as before" if old == lines else f"was {'; '.join(map(_words, old)) or 'the fixed order'}"
        print(f"{device} {op} {dtype}: {'; '.join(map(_words, lines))} ({before})")
    with replace_file(output) as file:
        file.write(f"{json.dumps(dict(sorted(table.items())), indent=1, allow_nan=False)}\n".encode())
    print(f"written to {output}")


def lines_of(path: str | Path) -> dict[tuple[str, str, str], list[dict]]:
    """The lines that a record gives, smallest bound first, by device, op and dtype."""
    results = record.load(path)
    if record.request(results).size == "tiny":
        raise ValueError(f"{path} is of tiny cases, whose times mean nothing; measure without LFCC_BENCH_SIZE=tiny")
    lines = {}
    for run in (results["runs"][name] for name in RUNS if name in results["runs"]):
        capability = run["environment"].get("capability")
        device = f"sm_{capability.replace('.', '')}" if capability else "cpu"
        for (op, dtype), group in _groups(record.rows_of(run)).items():
            if rule := best_rule(op, group):
                lines[device, op, dtype] = _lines(op, dtype, rule, group, _name(path))
    return lines


def best_rule(op: str, group: Group) -> Rule:
    """The backends to take, by size of the call; empty where there is one alone, or none that can serve."""
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
        if below != above and ((op, below) != ("info_nce", "eager") or size <= MOST_PAIRS_OF_EAGER)
    ]

    def mean(rule: Rule) -> float:
        return math.exp(sum(math.log(times.get(_chosen(rule, size), math.inf)) for size, times in group) / len(group))

    best = min(single, key=mean)
    split = min(double, key=mean, default=best)
    best = split if mean(best) > GAIN_OF_A_CROSSOVER * mean(split) else best
    return best if mean(best) < math.inf else []


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], Group]:
    """What ours took by backend, case by case; cases in which none was timed are left out."""
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.op and row.ours and row.dtype != "float64":
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
        cases = [times for size, times in group if _chosen(rule, size) == backend]
        runners_up = [
            min((time for name, time in times.items() if name != backend), default=math.inf) / times[backend]
            for times in cases
        ]
        worst = min(runners_up)
        lines.append(
            {
                "op": op,
                "dtype": dtype,
                "up_to": bound,
                "backend": backend,
                "record": path,
                "cases": len(cases),
                "worst": round(worst, 3) if worst < math.inf else None,
            }
        )
    return lines


def _chosen(rule: Rule, size: int) -> str:
    return next(backend for bound, backend in rule if bound is None or size <= bound)


def _name(path: str | Path) -> str:
    """Of a record, from the root of the checkout where it lies in it."""
    path, root = Path(path).resolve(), PACKAGE.parent
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _words(line: dict) -> str:
    bound = "else" if line["up_to"] is None else f"up to {line['up_to']}"
    worst = "" if line["worst"] is None else f", worst {line['worst']}x"
    return f"{bound} {line['backend']} by {line['cases']} cases{worst}, {line['record']}"
