"""The whole measurement, once with each heap, then its tables. More arguments go to pytest: `-k lfcc`."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a smoke test with the smallest shapes")
    parser.add_argument("--results", metavar="FILE", help="results file to write")
    args, pytest_args = parser.parse_known_args()
    if args.tiny:
        os.environ["LFCC_BENCH_TINY"] = "1"
    if args.results:
        os.environ["LFCC_BENCH_RESULTS"] = args.results
    from benchmarks import machine, record  # reads the environment that the lines above have set
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


if __name__ == "__main__":
    sys.exit(main())
