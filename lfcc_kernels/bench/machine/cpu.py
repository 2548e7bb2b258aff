"""The CPU of this machine: heap, caches, copy bandwidth and GEMM rate."""

import functools
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

import torch

from lfcc_kernels.backends import native
from lfcc_kernels.bench.machine.base import Call, Machine, host_clock, slug
from lfcc_kernels.bench.record import Request

# glibc returns the memory of every large tensor to the kernel, so each new tensor costs page faults again. These
# settings keep the memory; glibc reads them when a process starts.
KEPT_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Cpu(Machine):
    """Timed by the host's clock. The run is "kept" if the process started with KEPT_HEAP, otherwise "default"."""

    device = torch.device("cpu")
    seconds_per_case = 1.5
    tolerance = MappingProxyType({torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3})
    float64_limit = 1 << 30

    def __init__(self, size: str = "full") -> None:
        super().__init__(size)
        kept = all(os.environ.get(name) == value for name, value in KEPT_HEAP.items())
        self.run = "kept" if kept else "default"

    def name(self) -> str:
        return f"{slug(self._model())}-{os.cpu_count()}-cores"

    def cache_bytes(self) -> int:
        return _last_cache()

    def copy_gbps(self) -> float:
        size = 1 << 20 if self.tiny else 2 * self.cache_bytes()
        if native.host is not None:
            return native.host.copy_bandwidth(size, 3)
        source, target = torch.ones(2, size // 4)
        return 2 * size / min(self.seconds(lambda: target.copy_(source)) for _ in range(3)) / 1e9

    def gemm_gflops(self, dtype: torch.dtype) -> float:
        """Always in float32, to which the kernels convert 16-bit rows."""
        a, b, c = _gemm_operands(128 if self.tiny else 1536)
        return 2 * len(a) ** 3 / min(self.seconds(lambda: torch.mm(a, b, out=c)) for _ in range(2)) / 1e9

    def clock_mhz(self) -> float | None:
        """The highest clock of all cores."""
        lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
        return max((float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")), default=None)

    def seconds(self, call: Callable[[], object], calls: int = 1, head_start: float = 0.0) -> float:
        gc.disable()
        try:
            return host_clock(call, calls)
        finally:
            gc.enable()

    def peak_memory(self, request: Request, case: str, calls: Mapping[str, Call]) -> dict[str, int]:
        """In a separate process (bench/memory.py), because this one has memory from earlier calls."""
        if self.run == "kept" or not Path("/proc/self/clear_refs").exists():
            return {}
        command = [sys.executable, "-m", "lfcc_kernels.bench.memory", json.dumps(asdict(request)), case, *calls]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:  # keep the times
            print(f"{case}: peak memory could not be measured: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return {}
        return json.loads(done.stdout.splitlines()[-1])

    def environment(self) -> dict:
        return {
            "device": self._model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "last_cache_bytes": self.cache_bytes(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "transparent_hugepage": _THP.read_text().strip() if _THP.exists() else "unknown",
            **super().environment(),
        }

    def _model(self) -> str:
        import cpuinfo  # takes a second, which a run on a GPU saves

        return cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()


@functools.cache
def _last_cache() -> int:
    """32 MiB if the system does not report it."""
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=32 << 20)


@functools.cache
def _gemm_operands(side: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, side, side).unbind()
