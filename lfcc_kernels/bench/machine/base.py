"""What the harness asks of a machine: a clock, the ceilings, peak memory and facts, all of this process."""

import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone

import torch
from torch import Tensor

import lfcc_kernels as lk
from lfcc_kernels.bench.record import Request
from lfcc_kernels.version import commit

# "full", "quick" (few cases, shorter, nothing compiled by torch) or "tiny": the smallest shapes and probes, a smoke
# test of the benchmarks, whose times mean nothing.
SIZE = os.environ.get("LFCC_BENCH_SIZE", "full")

Call = Callable[[], tuple[Tensor, ...]]


class Machine(ABC):
    """One implementation a kind of device."""

    device: torch.device
    run: str  # under which name the results file keeps what is measured here
    seconds_a_case: float  # a case of a full benchmark gets as many rounds as fit in this time
    tolerance: Mapping[torch.dtype, float]  # deviation from the reference, over its largest value, that is rounding
    float64_limit: int  # above this many bytes of inputs the reference is eager in the case's dtype
    graph_below: float = 0.0  # seconds under which calls are captured and replayed together
    weighs_all: bool = False  # whether peak memory costs so little that it is measured in every case

    @abstractmethod
    def name(self) -> str:
        """Name of the device, fit for a folder."""

    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of the last cache level."""

    @abstractmethod
    def copy_gbps(self) -> float:
        """Gigabytes a second read and written by a copy past the last cache, best of three."""

    @abstractmethod
    def gemm_gflops(self, dtype: torch.dtype) -> float:
        """10^9 multiplications and additions a second of a square GEMM, best of some."""

    @abstractmethod
    def clock_mhz(self) -> float | None:
        """The clock at this moment; None where the device does not say."""

    @abstractmethod
    def seconds(self, call: Callable[[], object], calls: int = 1, head_start: float = 0.0) -> float:
        """Time of one of `calls` calls in a row; what a call gives back is dropped after the clock has stopped.

        A device that works beside its host begins so many seconds late, with the call enqueued by then.
        """

    def rounds(self, seconds_a_round: float) -> int:
        """How many rounds of that length a case gets."""
        fewest, most, budget = {"full": (7, 50, 1.0), "quick": (5, 20, 0.4), "tiny": (3, 3, 0.0)}[SIZE]
        return min(most, max(fewest, int(budget * self.seconds_a_case / seconds_a_round)))

    def host_seconds(self, call: Callable[[], object]) -> float:
        """Time that the host needs to enqueue a call; nothing where the host does the work."""
        return 0.0

    def capture(self, calls: Sequence[Call]) -> Callable[[], None]:
        """All calls as one that the device replays; raises where that cannot be."""
        raise NotImplementedError

    @abstractmethod
    def peak_memory(self, request: Request, case: str, calls: Mapping[str, Call]) -> dict[str, int]:
        """Bytes beyond inputs, results and gradients of the candidates; without those it cannot be told for."""

    def environment(self) -> dict:
        """What a reader must know to judge the times."""
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


def slug(name: str) -> str:
    """A name fit for a folder: "amd-epyc-9554"."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
