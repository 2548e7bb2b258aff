"""The processor of this machine: heap, caches, copy bandwidth and GEMM rate."""

import functools
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from benchmarks.machine.base import TINY, Call, Machine, slug
from lfcc_kernels.backends import native

# glibc gives every large tensor back to the kernel, so each new one costs its page faults again. These
# settings keep the memory; they count only when they are in the environment before the process starts.
KEPT_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}

GEMM_SIDE = 128 if TINY else 1536
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Cpu(Machine):
    """The clock is the host's; the run is named after the heap, "kept" where KEPT_HEAP was set, else "default"."""

    device = torch.device("cpu")
    seconds_a_case, rounds = (0.0, (3, 3)) if TINY else (1.5, (7, 50))
    tolerance = MappingProxyType({torch.float32: 1e-4, torch.bfloat16: 2e-2})
    float64_limit = 256 << 20  # float64 would take gigabytes

    def __init__(self) -> None:
        kept = all(os.environ.get(name) == value for name, value in KEPT_HEAP.items())
        self.run = "kept" if kept else "default"

    def name(self) -> str:
        return f"{slug(self._model())}-{os.cpu_count()}-cores"

    def cache_bytes(self) -> int:
        return _last_cache()

    def copy_gbps(self) -> float:
        size = 1 << 20 if TINY else 2 * self.cache_bytes()
        if native.host is not None:
            return native.host.copy_bandwidth(size, 3)
        source, target = torch.ones(2, size // 4)
        return 2 * size / min(self.seconds(lambda: target.copy_(source)) for _ in range(3)) / 1e9

    def gemm_gflops(self, dtype: torch.dtype) -> float:
        """Always in float32: to that two bytes are raised before a product."""
        a, b, c = _gemm_operands()
        return 2 * GEMM_SIDE**3 / min(self.seconds(lambda: torch.mm(a, b, out=c)) for _ in range(2)) / 1e9

    def seconds(self, call: Callable[[], object], calls: int = 1, head_start: float = 0.0) -> float:
        gc.disable()
        try:
            start = time.perf_counter()
            for _ in range(calls):
                results = call()
            seconds = (time.perf_counter() - start) / calls
        finally:
            gc.enable()
        del results
        return seconds

    def peak_memory(self, case: str, calls: Mapping[str, Call]) -> dict[str, int]:
        """In a process of its own (benchmarks/memory.py): this one keeps memory that it has used before."""
        if self.run == "kept" or not Path("/proc/self/clear_refs").exists():
            return {}
        command = [sys.executable, "-m", "benchmarks.memory", case, *calls]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return json.loads(output.splitlines()[-1])

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
        import cpuinfo  # takes a second, and a run on another device does without

        return cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()


@functools.cache
def _last_cache() -> int:
    """32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=32 << 20)


@functools.cache
def _gemm_operands() -> tuple[torch.Tensor, ...]:
    return torch.randn(3, GEMM_SIDE, GEMM_SIDE).unbind()
