"""Measures the cases of a record, one after the other.

The work is done by a child, `python -m lfcc_kernels.bench.runner RECORD DEADLINE`, which writes the record before and
after every case: a fault on a GPU, or memory that runs out on a CPU, ends the process it happens in. Another child goes
on where one has ended, without the peers that took a device down. On a CPU each heap has a child of its own.
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

from lfcc_kernels.bench import machine, record
from lfcc_kernels.bench.cases import Case, choose
from lfcc_kernels.bench.harness import SKIPPED, Contest, about, reason
from lfcc_kernels.bench.record import NOT_REACHED, Request, Row

ENDED = "the process ended in this case"
DOWN = "took the device down: "
GRACE = 60  # seconds beyond the limit that the case in hand has, before it is ended


def runs(request: Request) -> dict[str, dict[str, str]]:
    """The runs of a request, each with what its child has in the environment beside this process's."""
    setting = {"LFCC_BENCH_DEVICE": request.device, "LFCC_BENCH_SIZE": request.size}
    if request.device == "cuda":
        return {"cuda": setting}
    default = {"default": setting}
    return default | {"kept": setting | machine.KEPT_HEAP} if request.size == "full" else default


def start(request: Request) -> dict:
    """A record in which nothing has been measured yet."""
    results = record.new(request)
    cases = choose(request)
    if not cases:
        raise ValueError(f"no case has {' or '.join(request.words)} in its name in {', '.join(request.suites)}")
    for run in runs(request):
        rows = [_left_out(case, "skipped", NOT_REACHED) for case in cases if case.heaps or run != "kept"]
        record.put(results, run, {}, [replace(row, run=run) for row in rows])
    return results


def again(results: dict) -> dict:
    """The record with those cases to do again that a process ended in.

    Raises:
        ValueError: there is nothing left to do, or this is another machine or version than began the record.
    """
    now, left = machine.HERE.environment(), 0
    for name, run in results["runs"].items():
        for key in ("device", *record.VERSIONS):
            if run["environment"] and run["environment"][key] != now[key]:
                raise ValueError(
                    f"the record was begun with {key} {run['environment'][key]}, here it is {now[key]}; "
                    "measure a new one without --resume"
                )
        old = record.rows_of(run)
        rows = [replace(row, status="skipped", note=NOT_REACHED) if row.note == ENDED else row for row in old]
        left += sum(row.note == NOT_REACHED for row in rows)
        record.put(results, name, run["environment"], rows)
    if not left:
        raise ValueError("the record is complete, there is nothing to resume")
    return results


def measure(path: Path, minutes: float) -> bool:
    """Measure what is left to do in the record at `path`; whether ours was right in all cases that could run."""
    deadline = time.time() + 60 * minutes
    for run, setting in runs(record.request(record.load(path))).items():
        _measure_run(path, run, {**os.environ, **setting}, deadline)
    ours = (row for row in record.rows(record.load(path)) if row.candidate == "ours")
    return all(row.status in ("ok", "skipped") for row in ours)


def _measure_run(path: Path, run: str, environment: dict[str, str], deadline: float) -> None:
    command = [sys.executable, "-m", "lfcc_kernels.bench.runner", str(path), str(deadline)]
    before = None
    while left := sum(row.note == NOT_REACHED for row in record.rows_of(record.load(path)["runs"][run])):
        if left == before or time.time() > deadline:
            break
        before = left
        child = subprocess.Popen(command, env=environment)
        try:
            ended = child.wait(max(1.0, deadline + GRACE - time.time()))
        except subprocess.TimeoutExpired:
            child.kill()
            ended = child.wait()
            print(f"ended {GRACE} seconds beyond the limit", flush=True)
        except KeyboardInterrupt:
            child.wait()  # the child was interrupted too, and leaves the record in order
            raise
        if ended:
            print(f"the process ended with status {ended}", flush=True)


def work(path: Path, deadline: float) -> int:
    """Measure what is left to do in one run of the record; not 0 where the device cannot be used any more."""
    results = record.load(path)
    request, before = record.request(results), results["runs"][machine.HERE.run]
    environment = before["environment"] or machine.HERE.environment()
    old = record.rows_of(before)
    rows: dict[str, list[Row]] = {}
    for row in old:
        rows.setdefault(row.case, []).append(row)

    def put(case: Case, change: list[Row]) -> None:
        rows[case.name] = change
        record.put(results, machine.HERE.run, environment, (row for some in rows.values() for row in some))
        record.save(path, results)

    parent = os.getppid()  # without it nobody waits for what is measured
    guilty = {row.candidate for row in old if row.note.startswith(DOWN)} - {"ours", "eager"}
    left = [case for case in choose(request) if case.name in rows and rows[case.name][0].note == NOT_REACHED]
    total = len({(row.run, row.case) for row in record.rows(results)})
    done = total - sum(row.note == NOT_REACHED for row in record.rows(results))
    with tqdm(desc=f"{machine.HERE.run} run", total=total, initial=done, smoothing=0.1, disable=None) as bar:
        for case in left:
            if time.time() > deadline or os.getppid() != parent:
                break
            put(case, [_left_out(case, "failed", ENDED)])
            try:
                measured = _measure(_without(case, guilty), request)
            except KeyboardInterrupt:
                put(case, [_left_out(case, "skipped", NOT_REACHED)])
                return 130
            put(case, measured)
            bar.write(_line(measured))
            bar.update()
            if not _usable():
                put(case, _accuse(measured))
                return 1
    return 0


def _measure(case: Case, request: Request) -> list[Row]:
    try:
        contest = Contest(case, request)
        contest.play()
        return contest.rows(contest.peaks())
    except SKIPPED as error:
        return [_left_out(case, "skipped", reason(error))]
    except Exception as error:  # not of a candidate, so there is nothing to compare with
        traceback.print_exc()
        return [_left_out(case, "failed", reason(error))]
    finally:
        case.close()


def _without(case: Case, names: Container[str]) -> Case:
    return replace(case, candidates={name: call for name, call in case.candidates.items() if name not in names})


def _accuse(rows: list[Row]) -> list[Row]:
    """The first that failed took the device down, and the others failed because of it."""
    first = next((row for row in rows if row.status == "failed"), None)
    return [replace(row, note=DOWN + row.note) if row is first else row for row in rows]


def _left_out(case: Case, status: str, note: str) -> Row:
    return Row(**about(case), candidate="ours", backend="", status=status, note=note)


def _line(rows: list[Row]) -> str:
    ours = next(row for row in rows if row.candidate == "ours")
    if ours.median_ms is None:
        return f"{ours.case}: ours {ours.status}, {ours.note}"
    others = {row.candidate: row.median_ms for row in rows if row is not ours and row.median_ms is not None}
    times = ", ".join(f"{name} {ms:.3g}" for name, ms in others.items())
    return f"{ours.case}: {ours.median_ms:.3g} ms; {times}"


def _usable() -> bool:
    """Whether the device still answers, with random numbers."""
    try:
        return torch.randn(8, device=machine.HERE.device).sum().isfinite().item()
    except Exception:
        return False


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), float(sys.argv[2])))
