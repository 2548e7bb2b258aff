"""The machine that is measured: `HERE`, the CPU unless LFCC_BENCH_DEVICE is "cuda"."""

import os

from lfcc_kernels.bench.machine.base import SIZE, Machine
from lfcc_kernels.bench.machine.cpu import KEPT_HEAP, Cpu
from lfcc_kernels.bench.machine.cuda import Cuda

__all__ = ["HERE", "KEPT_HEAP", "SIZE", "Cpu", "Cuda", "Machine"]

HERE: Machine = {"cpu": Cpu, "cuda": Cuda}[os.environ.get("LFCC_BENCH_DEVICE", "cpu")]()
