"""Performance targets: bounds on the rows of a record, checked by the tables and marked in the plots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lfcc_kernels.bench.record import Row

Rows = Mapping[tuple[str, str], Row]  # by case and candidate, of one run

HEAPS, GPU, MODES = ("default", "kept"), ("cuda",), ("fwd", "fwd+bwd")
METRICS = {  # unit, and whether the bound is a lower one
    "speedup": ("x", True),
    "floor": ("%", True),
    "memory": ("MiB", False),
    "memory growth": ("x", False),
    "latency": ("us", False),
}
GPU_MAPS = (  # 50 MB or more
    *("nchw-256x256x56x56", "nchw-256x512x28x28", "nchw-256x1024x14x14", "nchw-256x2048x7x7"),
    *("channels_last-256x256x56x56", "tokens-256x197x768", "learnable-256x256x56x56"),
)


@dataclass(frozen=True)
class Target:
    """A bound on a metric of these cases in these runs."""

    what: str
    metric: str  # a key of METRICS
    cases: tuple[str, ...]
    bound: float
    runs: tuple[str, ...] = HEAPS
    peer: str = "eager"

    def measure(self, rows: Rows) -> float:
        """The value of the metric; raises LookupError if a row or its value is missing."""

        def values(field: str, candidate: str = "lfcc") -> list[float]:
            found = [getattr(rows[case, candidate], field) for case in self.cases]
            if None in found:
                raise LookupError(f"{field} of {candidate} was not measured")
            return found

        match self.metric:
            case "speedup":  # the smallest of the cases
                times = zip(values("median_ms", self.peer), values("median_ms"), strict=True)
                return min(peer / lfcc for peer, lfcc in times)
            case "floor":
                return 100 * values("fraction_of_floor")[0]
            case "memory":
                return values("peak_memory_bytes")[0] / 2**20
            case "memory growth":
                small, large = values("peak_memory_bytes")
                return large / max(1, small)
            case "latency":
                return 1e3 * values("median_ms")[0]
        raise ValueError(self.metric)

    def verdict(self, rows: Rows) -> dict[str, str]:
        """The last columns of the table of targets."""
        unit, at_least = METRICS[self.metric]
        bound = f"{'>=' if at_least else '<='} {self.bound:g} {unit}"
        try:
            value = self.measure(rows)
        except LookupError:
            return {"target": bound, "measured": "not measured", "met": ""}
        met = value >= self.bound if at_least else value <= self.bound
        return {"target": bound, "measured": f"{value:.3g} {unit}", "met": "yes" if met else "no"}


def _lowpass(mode: str, what: str, bound: float, *modes: str, **options) -> Target:
    cases = tuple(f"lowpass-nchw-32x256x56x56-float32-{m}" for m in modes or (mode,))
    return Target(f"lowpass (32, 256, 56, 56), {mode}: speedup over {what}", "speedup", cases, bound, **options)


def _overhead(op: str, shape: str) -> Target:
    case = f"overhead-{op}-{shape}-float32-fwd"
    return Target(f"{op}, fwd: call overhead", "latency", (case,), 20, (*HEAPS, *GPU))


def _info_nce(batch: int, dim: int, dtype: str, bound: float, runs: tuple[str, ...]) -> Target:
    shape = f"info_nce B = {batch}, D = {dim}" + (f", {dtype}" if runs == GPU else "")
    case = f"info_nce-one-way-{batch}x{dim}-{dtype}-fwd+bwd"
    return Target(f"{shape}, fwd+bwd: fraction of GEMM rate", "floor", (case,), bound, runs)


def _cpu_info_nce(dim: int) -> tuple[Target, Target]:
    speed = _info_nce(4096, dim, "float32", 90, HEAPS)
    what = f"info_nce B = 4096, D = {dim}, fwd+bwd: memory beyond inputs and gradients"
    return speed, Target(what, "memory", speed.cases, 32, ("default",))


def _least_speedup(what: str, shapes: Sequence[str], dtype: str, runs: tuple[str, ...]) -> Target:
    cases = tuple(f"info_nce-one-way-{shape}-{dtype}-{mode}" for mode in MODES for shape in shapes)
    return Target(f"{what}: least speedup over eager", "speedup", cases, 1, runs)


def _map(layout: str, mode: str) -> Target:
    case = f"lowpass-{layout}-bfloat16-{mode}"
    return Target(f"lowpass {layout}, {mode}: fraction of copy bandwidth", "floor", (case,), 85, GPU)


TARGETS = (
    _lowpass("fwd", "eager", 6),
    _lowpass("fwd+bwd", "eager", 5, runs=("default",)),
    _lowpass("fwd+bwd", "eager", 10, runs=("kept",)),
    _lowpass("both modes", "one GEMM", 1, *MODES, peer="one-GEMM"),
    *_cpu_info_nce(512),
    *_cpu_info_nce(128),
    _least_speedup("info_nce B <= 1024, one way", ("128x512", "256x512", "1024x512", "128x12288"), "float32", HEAPS),
    Target("LFCC loss, B = 128, fwd+bwd: speedup over eager", "speedup", ("lfcc-average-128x4x3-float32-fwd+bwd",), 5),
    Target(
        "LFCC loss: growth of memory from B = 1024 to 2048 (4x for a B x B matrix)",
        "memory growth",
        tuple(f"lfcc-small-maps-{batch}x1x3-float32-fwd+bwd" for batch in (1024, 2048)),
        2.2,
        ("default", *GPU),
    ),
    _overhead("lowpass", "2x8x8x8"),
    _overhead("info_nce", "2x8"),
    *(_map(layout, mode) for mode in MODES for layout in GPU_MAPS),
    *(
        _info_nce(batch, dim, "bfloat16", 50, GPU)
        for batch, dim in ((8192, 512), (8192, 1024), (8192, 2048), (16384, 512), (32768, 512))
    ),
    _least_speedup(
        "info_nce B <= 2048, one way, bfloat16",
        ("2048x512", "2048x2048", "1024x512", "256x512", "256x12288"),
        "bfloat16",
        GPU,
    ),
)
