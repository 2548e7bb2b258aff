"""The command `lfcc bench`: its options, and what each of them runs."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch

import lfcc_kernels as lk
from lfcc_kernels.bench import compare, dispatch, record, runner, tables
from lfcc_kernels.bench.cases import SUITES
from lfcc_kernels.bench.explain import explain
from lfcc_kernels.bench.machine import open_machine
from lfcc_kernels.bench.record import NOT_REACHED, Request
from lfcc_kernels.bench.tune.command import tune

RESULTS = Path("benchmarks", "results")


def bench(argv: Sequence[str]) -> int:
    """Run `lfcc bench` with these arguments. Returns 1 if lfcc was wrong, failed or has become slower."""
    args = _parser().parse_args(argv)
    if args.tune:
        tune(args.output)
        return 0
    if args.compare:
        return compare.main(*args.compare)
    if args.dispatch:
        dispatch.main(args.dispatch, args.output)
        return 0
    if args.resume:
        if any((args.suite, args.quick, args.dtype, args.backend, args.peer, args.words, args.output)):
            raise ValueError("bench --resume: reuses the options of the record; only --minutes may be given")
        path = _unfinished() if args.resume == "latest" else Path(args.resume)
        results = record.load(path)
        _check_device(record.request(results).device)
        return _measure(path, runner.resume(results), args.minutes)
    request = _request(args)
    if args.explain:
        print(explain(args.explain, request))
        return 0
    return _measure(args.output or _new_path(request), runner.start(request), args.minutes)


def _request(args: argparse.Namespace) -> Request:
    if unknown := [suite for suite in args.suite if suite not in SUITES]:
        raise ValueError(f"bench: unknown suite {', '.join(unknown)}; choose from {', '.join(SUITES)}")
    _check_device(args.device)
    if args.backend:
        with lk.use_backend(args.backend):  # raises if it is not available
            pass
    size = "quick" if args.quick else os.environ.get("LFCC_BENCH_SIZE", "full")
    return Request(args.suite or list(SUITES), args.device, size, args.dtype, args.backend, args.peer, args.words)


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"bench: device cuda needs an NVIDIA GPU, but torch {torch.__version__} finds none")


def _unfinished() -> Path:
    """The newest record with a case that was not reached."""
    for path in sorted(RESULTS.glob("*/*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        if f'"{NOT_REACHED}"' in path.read_text():
            return path
    raise ValueError(f"bench --resume: no unfinished record in {RESULTS}; give the path of one")


def _measure(path: Path, results: dict, minutes: float | None) -> int:
    minutes = minutes or (2 if record.request(results).size == "quick" else 30)
    record.save(path, results)
    print(f"record: {path}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        correct = runner.measure(path, minutes)
    except KeyboardInterrupt:
        print(f"interrupted; continue with: lfcc bench --resume {path}", file=sys.stderr)
        return 130
    finally:
        written = tables.save(path, record.load(path))
    print(f"tables: {written}; for an HTML page with plots: lfcc report {path}")
    if left := sum(row.note == NOT_REACHED for row in record.rows(record.load(path))):
        print(f"{left} cases not reached within {minutes:g} minutes; measure them with: lfcc bench --resume {path}")
    return 0 if correct else 1


def _new_path(request: Request) -> Path:
    machine = open_machine(request.device, request.size)
    folder = Path("build", "benchmarks") if machine.tiny else RESULTS / machine.name()
    return folder / f"{datetime.now():%Y-%m-%d-%H%M}.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lfcc bench",
        description="Benchmark the kernels and the LFCC loss against other implementations on this machine.",
    )
    add = parser.add_argument
    add("suite", nargs="*", metavar="SUITE", help=f"suites to run: {', '.join(SUITES)} (default: all)")
    add("--quick", action="store_true", help="run few cases, in 2 minutes instead of 30")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device to benchmark (default: %(default)s)")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="dtype of all cases (default: each case has its own)")
    add(
        "--backend",
        metavar="NAME",
        help="backend of lfcc: eager, cpu, triton or cuda (default: the one that auto selects, and then all others)",
    )
    add(
        "--peer",
        nargs="+",
        default=[],
        metavar="NAME",
        help="run only the peers with one of these words in their name, and eager (default: all peers)",
    )
    add(
        "-k",
        dest="words",
        nargs="+",
        default=[],
        metavar="WORD",
        help="run only the cases with one of these words in their name",
    )
    add(
        "--minutes",
        type=float,
        metavar="N",
        help="time limit; cases not reached are left for --resume (default: 30, with --quick 2)",
    )
    add("-o", "--output", type=Path, metavar="FILE", help=f"output file (default: {RESULTS}/DEVICE/DATE.json)")
    modes = parser.add_argument_group("other modes").add_mutually_exclusive_group()
    modes.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="RECORD",
        help="measure the missing cases of a record (the newest)",
    )
    modes.add_argument(
        "--compare",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="list changes between two records; exit code 1 if any is slower",
    )
    modes.add_argument(
        "--explain", metavar="CASE", help="break down the time of one case: floor, launches, page faults, operators"
    )
    modes.add_argument(
        "--dispatch", nargs="+", metavar="RECORD", help="write the table by which auto selects a backend, from records"
    )
    modes.add_argument(
        "--tune",
        action="store_true",
        help="tune tiles and crossovers of the Triton kernels on this GPU and write its table; takes a few minutes",
    )
    return parser
