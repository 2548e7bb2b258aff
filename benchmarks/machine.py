"""This machine as the floors see it: heap, caches, copy bandwidth and GEMM rate, all of this process."""

import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import cpuinfo
import torch

import lfcc_kernels as lk
from lfcc_kernels.backends import native

# Smallest shapes and probes, no torch.compile: a smoke test of the benchmarks, whose times mean nothing.
TINY = os.environ.get("LFCC_BENCH_TINY") == "1"

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


def heap() -> str:
    """ "kept" where KEPT_HEAP was set for this process, else "default"."""
    return "kept" if all(os.environ.get(name) == value for name, value in KEPT_HEAP.items()) else "default"


@functools.cache
def last_cache() -> int:
    """Bytes of the last cache level; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=32 << 20)


def copy_gbps() -> float:
    """Gigabytes a second read and written by a copy past the last cache, best of three."""
    size = 1 << 20 if TINY else 2 * last_cache()
    if native.host is not None:
        return native.host.copy_bandwidth(size, 3)
    source, target = torch.ones(2, size // 4)
    return 2 * size / _best(lambda: target.copy_(source)) / 1e9


def gemm_gflops() -> float:
    """10^9 multiplications and additions a second of a square float32 GEMM, best of two."""
    a, b, c = _gemm_operands()
    return 2 * GEMM_SIDE**3 / _best(lambda: torch.mm(a, b, out=c), repeats=2) / 1e9


@functools.cache
def _gemm_operands() -> tuple[torch.Tensor, ...]:
    return torch.randn(3, GEMM_SIDE, GEMM_SIDE).unbind()


def _best(call: Callable[[], object], repeats: int = 3) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return min(seconds() for _ in range(repeats))


def device_name() -> str:
    """Name of the device, fit for a folder: "amd-epyc-9554-2-cores"."""
    model = cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()
    words = "".join(c if c.isalnum() else " " for c in model.lower()).split()
    return "-".join([*words, str(os.cpu_count()), "cores"])


def environment() -> dict:
    """What a reader must know to judge the times: machine, threads, versions, load."""
    return {
        "device": cpuinfo.get_cpu_info().get("brand_raw", platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_cache_bytes": last_cache(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "transparent_hugepage": _THP.read_text().strip() if _THP.exists() else "unknown",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lfcc_kernels": lk.__version__,
        "backends": list(lk.available_backends()),
        "commit": _commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
        "tiny": TINY,
    }


def _commit() -> str:
    """The git commit of this folder, with "-dirty" where files differ from it; empty outside a repository."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
