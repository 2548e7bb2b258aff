"""Measures the cases of a record, one after the other.

A child process, `python -m lfcc_kernels.bench.runner RECORD DEADLINE`, measures and writes the record before and after
every case, because a GPU fault or a lack of memory ends the process in which it happens. If a child ends early, another
one continues, without the peers that crashed the device. On a CPU each heap has its own child.
"""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from lfcc_kernels.bench import record
from lfcc_kernels.bench.cases import Case, choose
from lfcc_kernels.bench.harness import SKIPPED, Benchmark, case_fields, reason
from lfcc_kernels.bench.machine import KEPT_HEAP, Machine, open_machine
from lfcc_kernels.bench.record import NOT_REACHED, Request, Row

ENDED = "the process ended in this case"
CRASHED = "took the device down: "
GRACE = 60  # seconds after the time limit in which the current case may finish


def start(request: Request) -> dict:
    """A new record in which no case has been measured yet."""
    results, machine = record.new(request), open_machine(request.device, request.size)
    cases = choose(request, machine)
    if not cases:
        raise ValueError(
            f"bench: no case of {', '.join(request.suites)} matches -k {' '.join(request.words)}; "
            "give a part of a case's name, e.g. one that a record lists"
        )
    for run in _environments(request):
        rows = [_without_time(case, machine, "skipped", NOT_REACHED) for case in cases if case.heaps or run != "kept"]
        record.put(results, run, {}, [replace(row, run=run) for row in rows])
    return results


def resume(results: dict) -> dict:
    """The record, with the cases in which a process ended marked to be measured again.

    Raises:
        ValueError: the record is complete, or was begun on another machine or with other versions.
    """
    request, left = record.request(results), 0
    now = open_machine(request.device, request.size).environment()
    for name, run in results["runs"].items():
        for key in ("device", *record.VERSIONS):
            if run["environment"] and run["environment"][key] != now[key]:
                raise ValueError(
                    f"bench --resume: the record was begun with {key} {run['environment'][key]}, "
                    f"but this is {key} {now[key]}; start a new record without --resume"
                )
        old = record.rows_of(run)
        rows = [replace(row, status="skipped", note=NOT_REACHED) if row.note == ENDED else row for row in old]
        left += sum(row.note == NOT_REACHED for row in rows)
        record.put(results, name, run["environment"], rows)
    if not left:
        raise ValueError("bench --resume: the record is complete; start a new one without --resume")
    return results


def measure(path: Path, minutes: float) -> bool:
    """Measure the remaining cases of the record at `path`; returns whether lfcc was correct in all that could run."""
    deadline = time.time() + 60 * minutes
    for run, environment in _environments(record.request(record.load(path))).items():
        _measure_run(path, run, {**os.environ, **environment}, deadline)
    lfcc = (row for row in record.rows(record.load(path)) if row.candidate == "lfcc")
    return all(row.status in ("ok", "skipped") for row in lfcc)


def _environments(request: Request) -> dict[str, dict[str, str]]:
    """The runs of a request, each with the environment variables that its child needs."""
    if request.device == "cuda":
        return {"cuda": {}}
    return {"default": {}, "kept": KEPT_HEAP} if request.size == "full" else {"default": {}}


def _measure_run(path: Path, run: str, environment: dict[str, str], deadline: float) -> None:
    command = [sys.executable, "-m", "lfcc_kernels.bench.runner", str(path), str(deadline)]
    before = None
    while left := sum(row.note == NOT_REACHED for row in record.rows_of(record.load(path)["runs"][run])):
        if left == before or time.time() > deadline:
            break
        before = left
        child = subprocess.Popen(command, env=environment)
        try:
            status = child.wait(max(1.0, deadline + GRACE - time.time()))
        except subprocess.TimeoutExpired:
            child.kill()
            status = child.wait()
            print(f"killed the measurement {GRACE} seconds after the time limit", flush=True)
        except KeyboardInterrupt:
            child.wait()  # the child was interrupted too and leaves a valid record
            raise
        if status:
            print(f"the measuring process ended with exit status {status}", flush=True)


def work(path: Path, deadline: float) -> int:
    """Measure the remaining cases of one run; returns non-zero if interrupted or if the device has become unusable."""
    results = record.load(path)
    request = record.request(results)
    machine = open_machine(request.device, request.size)
    begun = results["runs"][machine.run]
    environment = begun["environment"] or machine.environment()
    rows: dict[str, list[Row]] = {}
    for row in record.rows_of(begun):
        rows.setdefault(row.case, []).append(row)

    def put(case: Case, change: list[Row]) -> None:
        rows[case.name] = change
        record.put(results, machine.run, environment, (row for some in rows.values() for row in some))
        record.save(path, results)

    parent = os.getppid()  # if it ends, nobody waits for the results
    crashed = {row.candidate for some in rows.values() for row in some if row.note.startswith(CRASHED)}
    crashed -= {"lfcc", "eager"}
    left = [case for case in choose(request, machine) if case.name in rows and rows[case.name][0].note == NOT_REACHED]
    total = len({(row.run, row.case) for row in record.rows(results)})
    done = total - sum(row.note == NOT_REACHED for row in record.rows(results))
    with tqdm(desc=f"{machine.run} run", total=total, initial=done, smoothing=0.1, disable=None) as bar:
        for case in left:
            if time.time() > deadline or os.getppid() != parent:
                break
            put(case, [_without_time(case, machine, "failed", ENDED)])
            try:
                measured = _measure(_without(case, crashed), request, machine)
            except KeyboardInterrupt:
                put(case, [_without_time(case, machine, "skipped", NOT_REACHED)])
                return 130
            put(case, measured)
            bar.write(_line(measured))
            bar.update()
            if not _usable(machine):
                put(case, _mark_crash(measured))
                return 1
    return 0


def _measure(case: Case, request: Request, machine: Machine) -> list[Row]:
    try:
        benchmark = Benchmark(case, request, machine)
        benchmark.run()
        return benchmark.rows(benchmark.peak_memory())
    except SKIPPED as error:
        return [_without_time(case, machine, "skipped", reason(error))]
    except Exception as error:  # raised outside any candidate, so there is nothing to compare
        traceback.print_exc()
        return [_without_time(case, machine, "failed", reason(error))]
    finally:
        case.close()


def _without(case: Case, names: Container[str]) -> Case:
    return replace(case, candidates={name: call for name, call in case.candidates.items() if name not in names})


def _mark_crash(rows: list[Row]) -> list[Row]:
    """Blame the first candidate that failed; the others failed because the device was unusable."""
    first = next((row for row in rows if row.status == "failed"), None)
    return [replace(row, note=CRASHED + row.note) if row is first else row for row in rows]


def _without_time(case: Case, machine: Machine, status: str, note: str) -> Row:
    return Row(**case_fields(case, machine), candidate="lfcc", backend="", status=status, note=note)


def _line(rows: list[Row]) -> str:
    lfcc = next(row for row in rows if row.candidate == "lfcc")
    if lfcc.median_ms is None:
        return f"{lfcc.case}: lfcc {lfcc.status}, {lfcc.note}"
    others = {row.name: row.median_ms for row in rows if row is not lfcc and row.median_ms is not None}
    times = ", ".join(f"{name} {ms:.3g}" for name, ms in others.items())
    return f"{lfcc.case}: lfcc {lfcc.median_ms:.3g} ms; {times}"


def _usable(machine: Machine) -> bool:
    """Whether the device still computes."""
    try:
        return bool(torch.randn(8, device=machine.device).sum().isfinite())
    except Exception:
        return False


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), float(sys.argv[2])))
