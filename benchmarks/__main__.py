"""The whole measurement, then its tables: on a CPU once with each heap, on a GPU once.

On a CPU more arguments go to pytest, as `-k lfcc`; on a GPU `-k` takes words that a case's name may have.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what is measured")
    parser.add_argument("--tiny", action="store_true", help="a smoke test with the smallest shapes")
    parser.add_argument("--results", metavar="FILE", help="results file to write")
    args, others = parser.parse_known_args()
    os.environ["LFCC_BENCH_DEVICE"] = args.device
    if args.tiny:
        os.environ["LFCC_BENCH_TINY"] = "1"
    if args.results:
        os.environ["LFCC_BENCH_RESULTS"] = args.results
    return _measure_gpu(others) if args.device == "cuda" else _measure_cpu(others)


# What these two import reads the environment that the lines above have set.


def _measure_cpu(pytest_args: list[str]) -> int:
    from benchmarks import machine, record
    from benchmarks.report import report

    path = record.default_path()
    pytest = [sys.executable, "-m", "pytest", str(HERE), "-vv", "--benchmark-quiet", *pytest_args]
    failures = 0
    for heap in ({}, machine.KEPT_HEAP):
        environment = {**os.environ, **heap, "LFCC_BENCH_RESULTS": str(path)}
        failures += subprocess.run(pytest, cwd=HERE.parent, env=environment).returncode != 0
    if path.exists():
        print(f"\n{report(record.load(path))}")
    return 1 if failures else 0


def _measure_gpu(others: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks --device cuda")
    parser.add_argument("--limit", type=float, default=240, metavar="SECONDS", help="cases after it are left out")
    parser.add_argument(
        "-k", nargs="+", default=[], metavar="WORD", help="only cases with one of the words in the name"
    )
    args = parser.parse_args(others)
    import torch

    from benchmarks import record, runner
    from benchmarks.report import report

    if not torch.cuda.is_available():
        sys.exit(f"python -m benchmarks --device cuda: torch {torch.__version__} sees no NVIDIA GPU")
    path = record.default_path()
    reached = runner.run(path, args.limit, args.k)
    table = report(record.load(path))
    path.with_suffix(".md").write_text(f"{table}\n")
    print(f"\n{table}\n\nresults: {path}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
