"""What is to be reached, read off the rows of a record."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lfcc_kernels.bench.record import Row

Rows = Mapping[tuple[str, str], Row]  # by case and candidate, of one run

HEAPS = ("default", "kept")
GPU = ("cuda",)
LOWPASS = "lowpass-nchw-32x256x56x56-float32"
SMALL_INFO_NCE = tuple(
    f"info_nce-{case}-float32-{mode}"
    for mode in ("fwd", "fwd+bwd")
    for case in ("one-way-128x512", "one-way-256x512", "one-way-1024x512", "one-way-128x12288")
)
GPU_MAPS = (  # all of 50 MB and more
    "nchw-256x256x56x56",
    "nchw-256x512x28x28",
    "nchw-256x1024x14x14",
    "nchw-256x2048x7x7",
    "channels_last-256x256x56x56",
    "tokens-256x197x768",
    "learnable-256x256x56x56",
)
SMALL_INFO_NCE_GPU = tuple(
    f"info_nce-one-way-{shape}-bfloat16-{mode}"
    for mode in ("fwd", "fwd+bwd")
    for shape in ("2048x512", "2048x2048", "1024x512", "256x512", "256x12288")
)


@dataclass(frozen=True)
class Goal:
    """A bound on one figure in the given runs. `measure` raises LookupError where it was not measured."""

    what: str
    measure: Callable[[Rows], float]
    bound: float
    unit: str
    at_least: bool = True
    runs: tuple[str, ...] = HEAPS
    floor_of: str = ""  # the case whose fraction of the floor it bounds, in percent

    def reached(self, measured: float) -> bool:
        return measured >= self.bound if self.at_least else measured <= self.bound


def _value(rows: Rows, case: str, field: str, candidate: str = "ours") -> float:
    value = getattr(rows[case, candidate], field)
    if value is None:
        raise LookupError(f"{case}: {field} of {candidate} was not measured")
    return value


def _speedup(*cases: str, over: str = "eager") -> Callable[[Rows], float]:
    """The smallest of the cases' speedups over a peer."""
    return lambda rows: min(_value(rows, case, "median_ms", over) / _value(rows, case, "median_ms") for case in cases)


def _floor(what: str, case: str, percent: float, runs: tuple[str, ...]) -> Goal:
    """A bound from below on a case's fraction of its floor."""
    return Goal(
        what, lambda rows: 100 * _value(rows, case, "fraction_of_floor"), percent, "%", runs=runs, floor_of=case
    )


def _mebibytes(case: str) -> Callable[[Rows], float]:
    return lambda rows: _value(rows, case, "peak_memory_bytes") / 2**20


def _growth(small: str, large: str) -> Callable[[Rows], float]:
    return lambda rows: _value(rows, large, "peak_memory_bytes") / max(1, _value(rows, small, "peak_memory_bytes"))


def _microseconds(case: str) -> Callable[[Rows], float]:
    return lambda rows: 1e3 * _value(rows, case, "median_ms")


GOALS = (
    Goal("lowpass (32, 256, 56, 56), fwd, over eager", _speedup(f"{LOWPASS}-fwd"), 6, "x"),
    Goal(
        "lowpass (32, 256, 56, 56), fwd+bwd, over eager",
        _speedup(f"{LOWPASS}-fwd+bwd"),
        5,
        "x",
        runs=("default",),
    ),
    Goal(
        "lowpass (32, 256, 56, 56), fwd+bwd, over eager",
        _speedup(f"{LOWPASS}-fwd+bwd"),
        10,
        "x",
        runs=("kept",),
    ),
    Goal(
        "lowpass (32, 256, 56, 56), both modes, over one GEMM",
        _speedup(f"{LOWPASS}-fwd", f"{LOWPASS}-fwd+bwd", over="one-GEMM"),
        1,
        "x",
    ),
    *(
        goal
        for dim in (512, 128)
        for case in (f"info_nce-one-way-4096x{dim}-float32-fwd+bwd",)
        for goal in (
            _floor(f"info_nce B = 4096, D = {dim}, fwd+bwd, of the GEMM rate", case, 90, HEAPS),
            Goal(
                f"info_nce B = 4096, D = {dim}, fwd+bwd, memory beyond inputs and gradients",
                _mebibytes(case),
                32,
                "MiB",
                at_least=False,
                runs=("default",),
            ),
        )
    ),
    Goal("info_nce B <= 1024, one way, worst case, over dense torch", _speedup(*SMALL_INFO_NCE), 1, "x"),
    Goal("whole loss, B = 128, fwd+bwd, over eager", _speedup("lfcc-average-128x4x3-float32-fwd+bwd"), 5, "x"),
    Goal(
        "whole loss, growth of memory beyond inputs and gradients from B = 1024 to 2048 (B^2 would be 4)",
        _growth("lfcc-small-maps-1024x1x3-float32-fwd+bwd", "lfcc-small-maps-2048x1x3-float32-fwd+bwd"),
        2.2,
        "x",
        at_least=False,
        runs=("default", *GPU),
    ),
    Goal(
        "call of lowpass, fwd",
        _microseconds("overhead-lowpass-2x8x8x8-float32-fwd"),
        20,
        "us",
        at_least=False,
        runs=(*HEAPS, *GPU),
    ),
    Goal(
        "call of info_nce, fwd",
        _microseconds("overhead-info_nce-2x8-float32-fwd"),
        20,
        "us",
        at_least=False,
        runs=(*HEAPS, *GPU),
    ),
    *(
        _floor(f"lowpass {layout}, {mode}, of the copy bandwidth", f"lowpass-{layout}-bfloat16-{mode}", 85, GPU)
        for mode in ("fwd", "fwd+bwd")
        for layout in GPU_MAPS
    ),
    *(
        _floor(
            f"info_nce B = {batch}, D = {dim}, bfloat16, fwd+bwd, of the GEMM rate",
            f"info_nce-one-way-{batch}x{dim}-bfloat16-fwd+bwd",
            50,
            GPU,
        )
        for batch, dim in ((8192, 512), (8192, 1024), (8192, 2048), (16384, 512), (32768, 512))
    ),
    Goal(
        "info_nce B <= 2048, one way, bfloat16, worst case, over dense torch",
        _speedup(*SMALL_INFO_NCE_GPU),
        1,
        "x",
        runs=GPU,
    ),
)
