"""Workspace of the compiled contrast beyond inputs and gradients, measured in a separate process."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import ctypes, sys
from pathlib import Path
import torch
import lfcc_kernels as lk

batch, dim, direction = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

def step(batch, dim):
    student, teacher = torch.randn(batch, dim, requires_grad=True), torch.randn(batch, dim)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    with lk.use_backend("cpu"):
        lk.info_nce(student, teacher, direction=direction).backward()
    return status("VmHWM") - before - student.grad.nbytes // 1024

torch.set_num_threads(2)
step(512, dim)  # libraries allocate their buffers in the first call
print(step(batch, dim) / 1024)
"""


def working_mebibytes(batch: int, dim: int, direction: str = "student_to_teacher") -> float:
    command = [sys.executable, "-c", SCRIPT, str(batch), str(dim), direction]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")


@pytest.mark.parametrize("dim", [128, 512])
def test_contrast_stays_under_32_mebibytes(compiled_kernels: str, dim: int) -> None:
    assert working_mebibytes(4096, dim) < 32  # the similarities alone are 64


def test_symmetric_contrast_does_not_store_the_matrix(compiled_kernels: str) -> None:
    assert working_mebibytes(6144, 128, "symmetric") < 32  # the similarities alone are 144
