"""Peak memory of a case's candidates, in a process of their own: `python -m benchmarks.memory CASE`.

What the process holds at its highest point beyond what it held before the call, less the results and
gradients that the call returns. Linux's high-water mark counts every allocation, not only those of torch.
"""

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.cases import SUITES, Case, cases
from benchmarks.harness import step


def peak_memory(case: Case) -> dict[str, int]:
    """Bytes a candidate, or nothing where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    command = [sys.executable, "-m", "benchmarks.memory", case.name]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def _measure(case: Case, warm_up: Case) -> dict[str, int]:
    # Libraries take their own buffers with their first call, so that is made small.
    for call in warm_up.candidates.values():
        step(warm_up, call, warm_up.inputs(), None)
    torch.mm(torch.randn(1024, 1024), torch.randn(1024, 1024))
    inputs = case.inputs()
    peaks = {}
    for name, call in case.candidates.items():
        if name.startswith("compiled"):
            step(case, call, inputs, None)  # compiles
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # lowers the high-water mark to what is held now
        results = step(case, call, inputs, None)
        returned = sum(x.numel() * x.element_size() for x in results)
        peaks[name] = max(0, _status("VmHWM") - before - returned)
        del results
    return peaks


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    pairs = (pair for suite in SUITES for pair in zip(cases(suite), cases(suite, tiny=True), strict=True))
    print(json.dumps(next(_measure(case, small) for case, small in pairs if case.name == sys.argv[1])))
