"""Performance targets: bounds on the rows of a record, checked by the tables and marked in the plots."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lfcc_kernels.bench.record import Row

Rows = Mapping[tuple[str, str], Row]  # by case and candidate, of one run

HEAPS, GPU = ("default", "kept"), ("cuda",)
LOWPASS = "lowpass-nchw-32x256x56x56-float32"
MODES = ("fwd", "fwd+bwd")
INFO_NCE = tuple(
    f"info_nce-one-way-{shape}-float32-{mode}"
    for mode in MODES
    for shape in ("128x512", "256x512", "1024x512", "128x12288")
)
GPU_INFO_NCE = tuple(
    f"info_nce-one-way-{shape}-bfloat16-{mode}"
    for mode in MODES
    for shape in ("2048x512", "2048x2048", "1024x512", "256x512", "256x12288")
)
GPU_MAPS = (  # 50 MB or more
    *("nchw-256x256x56x56", "nchw-256x512x28x28", "nchw-256x1024x14x14", "nchw-256x2048x7x7"),
    *("channels_last-256x256x56x56", "tokens-256x197x768", "learnable-256x256x56x56"),
)
SMALL_MAPS = tuple(f"lfcc-small-maps-{batch}x1x3-float32-fwd+bwd" for batch in (1024, 2048))


class Metric(NamedTuple):
    """`measure(rows, cases, peer)` raises LookupError if a value was not measured."""

    unit: str
    at_least: bool
    measure: Callable[[Rows, tuple[str, ...], str], float]


def _value(rows: Rows, case: str, field: str, candidate: str = "ours") -> float:
    value = getattr(rows[case, candidate], field)
    if value is None:
        raise LookupError(f"{case}: {field} of {candidate} was not measured")
    return value


METRICS = {
    "speedup": Metric(  # the smallest of the cases
        "x",
        True,
        lambda rows, cases, peer: min(
            _value(rows, case, "median_ms", peer) / _value(rows, case, "median_ms") for case in cases
        ),
    ),
    "floor": Metric("%", True, lambda rows, cases, _: 100 * _value(rows, cases[0], "fraction_of_floor")),
    "memory": Metric("MiB", False, lambda rows, cases, _: _value(rows, cases[0], "peak_memory_bytes") / 2**20),
    "memory growth": Metric(
        "x",
        False,
        lambda rows, cases, _: (
            _value(rows, cases[1], "peak_memory_bytes") / max(1, _value(rows, cases[0], "peak_memory_bytes"))
        ),
    ),
    "latency": Metric("us", False, lambda rows, cases, _: 1e3 * _value(rows, cases[0], "median_ms")),
}


@dataclass(frozen=True)
class Target:
    """A bound on one metric of these cases in these runs."""

    what: str
    metric: str  # a key of METRICS
    cases: tuple[str, ...]
    bound: float
    runs: tuple[str, ...] = HEAPS
    peer: str = "eager"

    def verdict(self, rows: Rows) -> dict[str, str]:
        """The last columns of the table of targets."""
        unit, at_least, measure = METRICS[self.metric]
        bound = f"{'>=' if at_least else '<='} {self.bound:g} {unit}"
        try:
            value = measure(rows, self.cases, self.peer)
        except LookupError:
            return {"target": bound, "measured": "not measured", "met": ""}
        met = value >= self.bound if at_least else value <= self.bound
        return {"target": bound, "measured": f"{value:.3g} {unit}", "met": "yes" if met else "no"}


def _cpu_info_nce(dim: int) -> tuple[Target, ...]:
    what, cases = f"info_nce B = 4096, D = {dim}, fwd+bwd", (f"info_nce-one-way-4096x{dim}-float32-fwd+bwd",)
    return (
        Target(f"{what}: fraction of GEMM rate", "floor", cases, 90),
        Target(f"{what}: memory beyond inputs and gradients", "memory", cases, 32, ("default",)),
    )


TARGETS = (
    Target("lowpass (32, 256, 56, 56), fwd: speedup over eager", "speedup", (f"{LOWPASS}-fwd",), 6),
    *(
        Target(
            "lowpass (32, 256, 56, 56), fwd+bwd: speedup over eager", "speedup", (f"{LOWPASS}-fwd+bwd",), bound, (heap,)
        )
        for heap, bound in (("default", 5), ("kept", 10))
    ),
    Target(
        "lowpass (32, 256, 56, 56), both modes: speedup over one GEMM",
        *("speedup", (f"{LOWPASS}-fwd", f"{LOWPASS}-fwd+bwd"), 1),
        peer="one-GEMM",
    ),
    *_cpu_info_nce(512),
    *_cpu_info_nce(128),
    Target("info_nce B <= 1024, one way: least speedup over eager", "speedup", INFO_NCE, 1),
    Target("LFCC loss, B = 128, fwd+bwd: speedup over eager", "speedup", ("lfcc-average-128x4x3-float32-fwd+bwd",), 5),
    Target(
        "LFCC loss: growth of memory from B = 1024 to 2048 (4x for a B x B matrix)",
        *("memory growth", SMALL_MAPS, 2.2, ("default", *GPU)),
    ),
    Target("lowpass, fwd: call overhead", "latency", ("overhead-lowpass-2x8x8x8-float32-fwd",), 20, (*HEAPS, *GPU)),
    Target("info_nce, fwd: call overhead", "latency", ("overhead-info_nce-2x8-float32-fwd",), 20, (*HEAPS, *GPU)),
    *(
        Target(
            f"lowpass {layout}, {mode}: fraction of copy bandwidth",
            *("floor", (f"lowpass-{layout}-bfloat16-{mode}",), 85, GPU),
        )
        for mode in MODES
        for layout in GPU_MAPS
    ),
    *(
        Target(
            f"info_nce B = {batch}, D = {dim}, bfloat16, fwd+bwd: fraction of GEMM rate",
            *("floor", (f"info_nce-one-way-{batch}x{dim}-bfloat16-fwd+bwd",), 50, GPU),
        )
        for batch, dim in ((8192, 512), (8192, 1024), (8192, 2048), (16384, 512), (32768, 512))
    ),
    Target("info_nce B <= 2048, one way, bfloat16: least speedup over eager", "speedup", GPU_INFO_NCE, 1, GPU),
)
