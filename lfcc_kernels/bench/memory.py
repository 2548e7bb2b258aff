"""Peak memory on a CPU, in a separate process: `python -m lfcc_kernels.bench.memory REQUEST CASE CANDIDATE...`.

The highest resident memory of the process minus the memory before the call and minus the results and gradients that
the call returns. Linux's high-water mark includes every allocation, not only those of torch.
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
from lfcc_kernels.bench.machine import open_machine
from lfcc_kernels.bench.record import Request


def _measure(case: Case, warm_up: Case, names: Sequence[str]) -> dict[str, int]:
    # Libraries allocate their own buffers in their first call, so that one is small.
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
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current memory
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
    machine = open_machine(request.device, request.size)
    pairs = zip(variants(request, machine), variants(request, machine.with_tiny_shapes()), strict=True)
    print(json.dumps(next(_measure(case, small, names) for case, small in pairs if case.name == wanted)))
