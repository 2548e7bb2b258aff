"""Runs cases of `cases.py` under the sanitizers; started by `test_sanitizers.py` in the environment of `build.py`.

Reads the names of cases from stdin, one per line, and prints "passed" or the exception for each. A finding of a
sanitizer ends the process with a report on stderr.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from emulation import build

build.load()

from emulation.cases import CASES, results_of  # noqa: E402

import lfcc_kernels as lk  # noqa: E402

torch.set_num_threads(1)
with lk.use_backend("cuda"):
    for line in sys.stdin:
        try:
            torch.manual_seed(0)
            results_of(*CASES[line.strip()]())
            answer = "passed"
        except Exception as error:
            answer = repr(error)
        print(answer, flush=True)
