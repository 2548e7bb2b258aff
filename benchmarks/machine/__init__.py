"""The machine that is measured: `HERE`, the CPU unless LFCC_BENCH_DEVICE is "cuda"."""

import os

from benchmarks.machine.base import TINY, Machine
from benchmarks.machine.cpu import KEPT_HEAP, Cpu
from benchmarks.machine.cuda import Cuda

__all__ = ["HERE", "KEPT_HEAP", "TINY", "Cpu", "Cuda", "Machine"]

HERE: Machine = {"cpu": Cpu, "cuda": Cuda}[os.environ.get("LFCC_BENCH_DEVICE", "cpu")]()
