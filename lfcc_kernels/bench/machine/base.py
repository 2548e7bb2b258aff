"""What the harness needs from a machine: a clock, the ceilings, peak memory, and facts for the record."""

import copy
import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone

import torch
from torch import Tensor

import lfcc_kernels as lk
from lfcc_kernels.bench.record import Request
from lfcc_kernels.version import commit

Call = Callable[[], tuple[Tensor, ...]]


class Machine(ABC):
    """A device and the size of the benchmark it runs.

    `size` is "full", "quick" (few cases, fewer rounds, no torch.compile) or "tiny" (a smoke test with the smallest
    shapes and probes, whose times are meaningless).
    """

    device: torch.device
    run: str  # name of its run in the record
    seconds_per_case: float  # time budget of a case in a full benchmark
    tolerance: Mapping[torch.dtype, float]  # deviation from the reference, relative to its largest value, by rounding
    float64_limit: int  # bytes of inputs above which the reference is eager in the case's dtype
    graph_below: float = 0.0  # seconds below which calls are captured and replayed together
    memory_of_all: bool = False  # whether peak memory is cheap enough to measure in every case

    def __init__(self, size: str = "full") -> None:
        self.size = size
        self.tiny = size == "tiny"

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def with_tiny_shapes(self) -> "Machine":
        """The same machine, whose cases have the same candidates on tiny shapes."""
        machine = copy.copy(self)
        machine.tiny = True
        return machine

    @abstractmethod
    def name(self) -> str:
        """Name of the device, usable as a folder name."""

    @abstractmethod
    def cache_bytes(self) -> int:
        """Size of the last-level cache in bytes."""

    @abstractmethod
    def copy_gbps(self) -> float:
        """10^9 bytes per second, read plus written, of a copy larger than the last-level cache; best of three."""

    @abstractmethod
    def gemm_gflops(self, dtype: torch.dtype) -> float:
        """10^9 FLOPs per second of a square GEMM; best of several."""

    @abstractmethod
    def clock_mhz(self) -> float | None:
        """The current clock; None if the device does not report it."""

    @abstractmethod
    def seconds(self, call: Callable[[], object], calls: int = 1, head_start: float = 0.0) -> float:
        """Time per call of `calls` calls in a row; results are freed after the clock has stopped.

        `head_start`: seconds of GPU sleep before the timed call, so that launches are already queued.
        """

    def rounds(self, seconds_per_round: float) -> int:
        """Number of rounds that fit into a case's time budget."""
        fewest, most, budget = {"full": (7, 50, 1.0), "quick": (5, 20, 0.4), "tiny": (3, 3, 0.0)}[self.size]
        return min(most, max(fewest, int(budget * self.seconds_per_case / seconds_per_round)))

    def host_seconds(self, call: Callable[[], object]) -> float:
        """Time the host needs to enqueue a call; 0 if the host itself computes."""
        return 0.0

    def capture(self, calls: Sequence[Call]) -> Callable[[], None]:
        """All calls as one replay; raises if the device cannot capture them."""
        raise NotImplementedError

    @abstractmethod
    def peak_memory(self, request: Request, case: str, calls: Mapping[str, Call]) -> dict[str, int]:
        """Peak bytes beyond inputs, results and gradients, by candidate; candidates it cannot measure are left out."""

    def environment(self) -> dict:
        """Facts needed to judge the times."""
        return {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lfcc_kernels": lk.__version__,
            "backends": list(lk.available_backends()),
            "commit": commit(),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "load_average": os.getloadavg()[0],
        }


def host_clock(call: Callable[[], object], calls: int) -> float:
    """Seconds per call by the host's clock; the last results are freed after it has stopped."""
    start = time.perf_counter()
    for _ in range(calls):
        results = call()  # noqa: F841
    return (time.perf_counter() - start) / calls


def slug(name: str) -> str:
    """A folder name such as "amd-epyc-9554"."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
