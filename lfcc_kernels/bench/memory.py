"""Peak memory on a CPU, in a process of its own: `python -m lfcc_kernels.bench.memory REQUEST CASE CANDIDATE...`.

What the process holds at its highest point beyond what it held before the call, less the results and
gradients that the call returns. Linux's high-water mark counts every allocation, not only those of torch.
"""

import ctypes
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lfcc_kernels.bench.cases import Candidate, Case, variants
from lfcc_kernels.bench.record import Request


def _measure(case: Case, warm_up: Case, names: Sequence[str]) -> dict[str, int]:
    # Libraries take their own buffers with their first call, so that is made small.
    for name in names:
        call, some = warm_up.candidates[name], warm_up.inputs()
        warm_up.run(call, some, _upstream(call, some))
    torch.mm(torch.randn(1024, 1024), torch.randn(1024, 1024))
    warm_up.close()
    inputs = case.inputs()
    peaks = {}
    for name in names:
        call = case.candidates[name]
        upstream = _upstream(call, inputs)
        if name.startswith("compiled"):
            case.run(call, inputs, upstream)  # compiles
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # lowers the high-water mark to what is held now
        results = case.run(call, inputs, upstream)
        returned = sum(x.numel() * x.element_size() for x in results)
        peaks[name] = max(0, _status("VmHWM") - before - returned)
        del results
    return peaks


def _upstream(call: Candidate, inputs: Sequence[Tensor]) -> Tensor:
    """A gradient of the result."""
    with torch.no_grad():
        return torch.ones_like(call(*inputs))


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    wanted, *names = sys.argv[2:]
    request = Request(**json.loads(sys.argv[1]))
    request = replace(request, suites=[wanted.split("-")[0]])
    pairs = zip(variants(request), variants(replace(request, size="tiny")), strict=True)
    print(json.dumps(next(_measure(case, small, names) for case, small in pairs if case.name == wanted)))
