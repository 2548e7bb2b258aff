"""The machine that the benchmark measures: a CPU or an NVIDIA GPU."""

from lfcc_kernels.bench.machine.base import Machine
from lfcc_kernels.bench.machine.cpu import KEPT_HEAP, Cpu
from lfcc_kernels.bench.machine.cuda import Cuda

__all__ = ["KEPT_HEAP", "Cpu", "Cuda", "Machine", "open_machine"]


def open_machine(device: str, size: str = "full") -> Machine:
    """The machine for device "cpu" or "cuda", which runs a benchmark of size "full", "quick" or "tiny"."""
    return {"cpu": Cpu, "cuda": Cuda}[device](size)
