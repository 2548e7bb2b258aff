"""An NVIDIA GPU through torch.cuda. No setting of the device is changed."""

import functools
import gc
import subprocess
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from lfcc_kernels.bench.machine.base import Call, Machine, host_clock, slug
from lfcc_kernels.bench.record import Request
from lfcc_kernels.version import package_version

_SLEEP_CYCLES = 2e9  # cycles of torch.cuda._sleep per second, at the highest clock, so that it never ends too early
_QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"
_PACKAGES = ("triton", "memeff", "inf-cl", "cut-cross-entropy", "liger-kernel", "open-clip-torch")


class Cuda(Machine):
    """Timed by the device's clock, which hides host and launches as a busy training step does.

    Only timings of several calls, which measure call overhead, use the host's clock.
    """

    device = torch.device("cuda")
    run = "cuda"
    seconds_per_case = 0.6
    # float32: peers and convolutions use TF32. 16 bits: logits of 10 are rounded before the exp.
    tolerance = MappingProxyType({torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 5e-2})
    float64_limit = 4 << 30
    graph_below = 50e-6
    memory_of_all = True

    def name(self) -> str:
        return slug(torch.cuda.get_device_name())

    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties().L2_cache_size

    def copy_gbps(self) -> float:
        source, target = _copy_operands(1 << 20 if self.tiny else 1 << 30)
        return 2 * source.nbytes / min(self.seconds(lambda: target.copy_(source)) for _ in range(3)) / 1e9

    def gemm_gflops(self, dtype: torch.dtype) -> float:
        side = 256 if self.tiny else 8192 if dtype.itemsize == 2 else 4096
        a, b, c = _gemm_operands(side, dtype)
        return 2 * len(a) ** 3 / min(self.seconds(lambda: torch.mm(a, b, out=c)) for _ in range(3)) / 1e9

    def clock_mhz(self) -> float | None:
        try:
            return float(_nvidia_smi("clocks.sm", "csv,noheader,nounits"))
        except ValueError:
            return None

    def seconds(self, call: Callable[[], object], calls: int = 1, head_start: float = 0.0) -> float:
        gc.disable()
        try:
            torch.cuda.synchronize()
            return host_clock(call, calls) if calls > 1 else _device_clock(call, head_start)
        finally:
            gc.enable()

    def host_seconds(self, call: Callable[[], object]) -> float:
        """With a margin, and at most 20 ms for a call that waits for the device."""
        torch.cuda.synchronize()
        return min(1.5 * host_clock(call, 1), 0.02)

    def capture(self, calls: Sequence[Call]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # A failed capture leaves torch's random number generator unusable, so synchronising calls are rejected before.
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):
                for call in calls[:3]:
                    call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        gc.disable()  # freeing memory must not become part of a capture
        try:
            with torch.cuda.graph(graph, stream=stream):
                for call in calls:
                    call()
        finally:
            gc.enable()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay

    def peak_memory(self, request: Request, case: str, calls: Mapping[str, Call]) -> dict[str, int]:
        """From the statistics of torch's allocator, which every candidate uses."""
        gc.collect()
        peaks = {name: _peak(call) for name, call in calls.items()}
        return {name: peak for name, peak in peaks.items() if peak is not None}

    def environment(self) -> dict:
        properties = torch.cuda.get_device_properties()
        self.gemm_gflops(torch.bfloat16)  # raises the clocks from those of an idle device
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "last_cache_bytes": properties.L2_cache_size,
            "nvidia_smi_fields": _QUERY,
            "nvidia_smi": _nvidia_smi(_QUERY, "csv,noheader"),
            "cuda": torch.version.cuda,
            "packages": {name: version for name in _PACKAGES if (version := package_version(name))},
            **super().environment(),
        }


def _device_clock(call: Callable[[], object], head_start: float) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(_SLEEP_CYCLES * (head_start + 50e-6)))
    start.record()
    results = call()
    end.record()
    end.synchronize()
    del results
    return start.elapsed_time(end) / 1e3


def _peak(call: Call) -> int | None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        results = call()
    except torch.OutOfMemoryError:  # keep the times
        return None
    torch.cuda.synchronize()
    returned = sum(x.numel() * x.element_size() for x in results)
    return max(0, torch.cuda.max_memory_allocated() - before - returned)


@functools.cache
def _copy_operands(size: int) -> tuple[torch.Tensor, ...]:
    source = torch.randn(size // 4, device="cuda")
    return source, torch.empty_like(source)


@functools.cache
def _gemm_operands(side: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, side, side, device="cuda").to(dtype).unbind()


def _nvidia_smi(fields: str, layout: str) -> str:
    """The driver's answer for the current device; empty if nvidia-smi fails."""
    device = torch.cuda.get_device_properties().uuid
    command = ["nvidia-smi", f"--id=GPU-{device}", f"--query-gpu={fields}", f"--format={layout}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
