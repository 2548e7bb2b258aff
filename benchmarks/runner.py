"""Runs the cases on a GPU, one after the other and without pytest.

A fault on a GPU ends the process it happens in. So the work is done by a child, `python -m benchmarks.runner`,
which writes the results file before and after every case; another child goes on where one has ended, without
the peers that took the device down.
"""

import subprocess
import sys
import time
import traceback
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import machine, record
from benchmarks.cases import SUITES, Case, cases
from benchmarks.harness import Contest, about
from benchmarks.record import Row

NOT_REACHED = "the time limit came first"
DOWN = "took the device down: "
GRACE = 30  # seconds beyond the limit that the case in hand has, before it is ended


def run(path: Path, limit: float, words: list[str]) -> bool:
    """Measure the cases whose names have one of the words; whether ours was measured in all that were reached."""
    deadline = time.time() + limit
    record.save(path, machine.HERE.run, {}, [])
    child = [sys.executable, "-m", "benchmarks.runner", str(path), str(deadline), *words]
    left: int | None = None
    while True:
        try:
            ended = subprocess.run(child, timeout=max(1, deadline + GRACE - time.time())).returncode
        except subprocess.TimeoutExpired:
            print(f"ended {GRACE} seconds beyond the limit", flush=True)
            break
        before, left = left, sum(row.note == NOT_REACHED for row in record.rows(record.load(path)))
        if ended == 0 or left in (0, before):
            break
        print(f"the process ended with status {ended}; {left} cases to go", flush=True)
    ours = [row for row in record.rows(record.load(path)) if row.candidate == "ours"]
    return bool(ours) and all(row.status == "ok" or row.note == NOT_REACHED for row in ours)


def work(path: Path, deadline: float, words: list[str]) -> int:
    """Measure what is left to do in the results file; not 0 where the device cannot be used any more."""
    before = record.load(path)["runs"][machine.HERE.run]
    environment = before["environment"] or machine.HERE.environment()
    wanted = [case for suite in SUITES for case in cases(suite) if not words or any(w in case.name for w in words)]
    old = record.rows({"runs": {"before": before}})
    rows = {
        case.name: [row for row in old if row.case == case.name] or [_left_out(case, "skipped", NOT_REACHED)]
        for case in wanted
    }

    def put(change: dict[str, list[Row]]) -> None:
        rows.update(change)
        record.save(path, machine.HERE.run, environment, (row for some in rows.values() for row in some))

    put({})
    guilty = {row.candidate for row in old if row.note.startswith(DOWN)} - {"ours", "eager"}
    left = [case for case in wanted if rows[case.name][0].note == NOT_REACHED]
    for number, case in enumerate(left, 1):
        start = time.time()
        if start > deadline:
            print(f"the limit is reached, {len(left) - number + 1} cases are left out", flush=True)
            break
        put({case.name: [_left_out(case, "failed", "the process ended in this case")]})
        put({case.name: _measure(_without(case, guilty))})
        print(f"[{number}/{len(left)}] {_line(rows[case.name])} ({time.time() - start:.1f} s)", flush=True)
        if not _usable():
            put({case.name: _accuse(rows[case.name])})
            return 1
    return 0


def _measure(case: Case) -> list[Row]:
    try:
        contest = Contest(case)
        contest.play()
        return contest.rows(contest.peaks())
    except Exception as error:  # not of a candidate, so there is nothing to compare with
        traceback.print_exc()
        return [_left_out(case, "failed", f"{type(error).__name__}: {error}".splitlines()[0][:200])]


def _without(case: Case, names: Container[str]) -> Case:
    return replace(case, candidates={name: call for name, call in case.candidates.items() if name not in names})


def _accuse(rows: list[Row]) -> list[Row]:
    """The first that failed took the device down, and the others failed because of it."""
    first = next((row for row in rows if row.status == "failed"), None)
    return [replace(row, note=DOWN + row.note) if row is first else row for row in rows]


def _left_out(case: Case, status: str, note: str) -> Row:
    return Row(**about(case), candidate="ours", status=status, note=note)


def _line(rows: list[Row]) -> str:
    ours = next(row for row in rows if row.candidate == "ours")
    others = {row.candidate: row.median_ms for row in rows if row is not ours and row.median_ms is not None}
    if ours.median_ms is None:
        return f"{ours.case}: ours {ours.status}, {ours.note}"
    times = ", ".join(f"{name} {ms:.3g}" for name, ms in others.items())
    return f"{ours.case}: {ours.median_ms:.3g} ms; {times}"


def _usable() -> bool:
    """Whether the device still answers, with random numbers."""
    try:
        return torch.randn(8, device=machine.HERE.device).sum().isfinite().item()
    except Exception:
        return False


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
