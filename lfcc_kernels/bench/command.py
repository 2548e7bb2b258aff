"""`lfcc bench`: what its options mean. What measures is imported after the device is known."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lfcc_kernels.files import replace_file

if TYPE_CHECKING:
    from lfcc_kernels.bench.record import Request

SUITES = ("overhead", "lowpass", "info_nce", "lfcc", "scaling", "step")
RESULTS = Path("benchmarks", "results")


def bench(argv: Sequence[str]) -> int:
    """Run `lfcc bench` with these arguments; 1 where ours was wrong, failed or has become slower."""
    args = _parser().parse_args(argv)
    if unknown := [suite for suite in args.suite if suite not in SUITES]:
        raise ValueError(f"bench: no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    if args.resume and any((args.suite, args.quick, args.dtype, args.backend, args.peer, args.words, args.output)):
        raise ValueError("bench --resume measures what its record was asked for; leave out all but --minutes")
    if args.tune:
        from lfcc_kernels.bench.tune.command import tune

        tune(args.output)
        return 0
    if args.compare:
        from lfcc_kernels.bench import compare

        return compare.main(*args.compare)
    if args.dispatch:
        from lfcc_kernels.bench import dispatch

        dispatch.main(args.dispatch, args.output)
        return 0
    _set_up(args)
    if args.explain:
        from lfcc_kernels.bench.explain import explain

        print(explain(args.explain, _request(args)))
        return 0
    return _measure(args)


def _set_up(args: argparse.Namespace) -> None:
    """Choose the machine, which bench.machine reads from the environment when it is imported."""
    import torch

    device, size = args.device, "quick" if args.quick else os.environ.get("LFCC_BENCH_SIZE", "full")
    if args.resume:
        from lfcc_kernels.bench import record

        args.resume = _unfinished() if args.resume == "latest" else Path(args.resume)
        begun = record.request(record.load(args.resume))
        device, size = begun.device, begun.size
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"bench --device cuda: torch {torch.__version__} sees no NVIDIA GPU")
    os.environ |= {"LFCC_BENCH_DEVICE": device, "LFCC_BENCH_SIZE": size}


def _unfinished() -> Path:
    """The newest record that has something left to measure."""
    from lfcc_kernels.bench import record

    for path in sorted(RESULTS.glob("*/*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        if f'"{record.NOT_REACHED}"' in path.read_text():
            return path
    raise ValueError(f"bench --resume: no unfinished record in {RESULTS}; name one")


def _request(args: argparse.Namespace) -> "Request":
    import lfcc_kernels as lk
    from lfcc_kernels.bench import machine
    from lfcc_kernels.bench.record import Request

    if args.backend:
        with lk.use_backend(args.backend):  # raises where it cannot serve
            pass
    suites = args.suite or list(SUITES)
    return Request(suites, machine.HERE.device.type, machine.SIZE, args.dtype, args.backend, args.peer, args.words)


def _measure(args: argparse.Namespace) -> int:
    from lfcc_kernels.bench import machine, record, runner, tables

    path = args.resume or args.output or _new_path()
    results = runner.again(record.load(path)) if args.resume else runner.start(_request(args))
    record.save(path, results)
    print(f"record: {path}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    minutes = args.minutes or (2 if machine.SIZE == "quick" else 30)
    try:
        right = runner.measure(path, minutes)
    except KeyboardInterrupt:
        print(f"interrupted; lfcc bench --resume {path} goes on", file=sys.stderr)
        return 130
    finally:
        with replace_file(path.with_suffix(".md")) as file:
            file.write(f"{tables.markdown(record.load(path))}\n".encode())
    rows = record.rows(record.load(path))
    left = sum(row.note == record.NOT_REACHED for row in rows)
    print(f"tables: {path.with_suffix('.md')}; lfcc report {path} draws pages")
    if left:
        print(f"{left} cases are left after {minutes:g} minutes; lfcc bench --resume {path} measures them")
    return 0 if right else 1


def _new_path() -> Path:
    from lfcc_kernels.bench import machine

    folder = Path("build", "benchmarks") if machine.SIZE == "tiny" else RESULTS / machine.HERE.name()
    return folder / f"{datetime.now():%Y-%m-%d-%H%M}.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lfcc bench", description="Measure the kernels and the loss against their peers, on this machine."
    )
    parser.add_argument("suite", nargs="*", metavar="SUITE", help=f"what to measure: {', '.join(SUITES)} (all)")
    parser.add_argument("--quick", action="store_true", help="few cases, in 2 minutes instead of 30")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what is measured (%(default)s)")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="of all cases (each has its own)")
    parser.add_argument("--backend", metavar="NAME", help="that serves ours (the one that auto takes, and the others)")
    parser.add_argument("--peer", nargs="+", default=[], metavar="NAME", help="only these beside ours and eager (all)")
    parser.add_argument(
        "-k", dest="words", nargs="+", default=[], metavar="WORD", help="only cases with one in the name"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="what is not reached by then is left for --resume")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"file to write ({RESULTS}/DEVICE/DATE.json)")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--resume", nargs="?", const="latest", metavar="RECORD", help="measure what a record lacks (the latest)"
    )
    other.add_argument(
        "--compare", nargs=2, metavar=("OLD", "NEW"), help="say what became slower; exit code 1 if any did"
    )
    other.add_argument(
        "--explain", metavar="CASE", help="measure one case: its floor, and where the rest of the time goes"
    )
    other.add_argument("--dispatch", nargs="+", metavar="RECORD", help="write the table that auto goes by")
    tune = "time tiles and crossovers of the Triton kernels on this GPU and write its table; a few minutes"
    other.add_argument("--tune", action="store_true", help=tune)
    return parser
