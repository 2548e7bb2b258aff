"""What is to be reached, read off the rows of a results file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.record import Row

Rows = Mapping[tuple[str, str], Row]  # by case and candidate, under one heap

HEAPS = ("default", "kept")
LOWPASS = "lowpass-nchw-32x256x56x56-float32"
SMALL_INFO_NCE = tuple(
    f"info_nce-{case}-float32-{mode}"
    for mode in ("fwd", "fwd+bwd")
    for case in ("one-way-128x512", "one-way-256x512", "one-way-1024x512", "one-way-128x12288")
)


@dataclass(frozen=True)
class Goal:
    """A bound on one figure under the given heaps. `measure` raises LookupError where it was not measured."""

    what: str
    measure: Callable[[Rows], float]
    bound: float
    unit: str
    at_least: bool = True
    heaps: tuple[str, ...] = HEAPS

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


def _percent_of_floor(case: str) -> Callable[[Rows], float]:
    return lambda rows: 100 * _value(rows, case, "fraction_of_floor")


def _mebibytes(case: str) -> Callable[[Rows], float]:
    return lambda rows: _value(rows, case, "peak_memory_bytes") / 2**20


def _growth(small: str, large: str) -> Callable[[Rows], float]:
    return lambda rows: _value(rows, large, "peak_memory_bytes") / _value(rows, small, "peak_memory_bytes")


def _microseconds(case: str) -> Callable[[Rows], float]:
    return lambda rows: 1e3 * _value(rows, case, "median_ms")


GOALS = (
    Goal("lowpass (32, 256, 56, 56), fwd, over eager", _speedup(f"{LOWPASS}-fwd"), 6, "x"),
    Goal(
        "lowpass (32, 256, 56, 56), fwd+bwd, over eager",
        _speedup(f"{LOWPASS}-fwd+bwd"),
        5,
        "x",
        heaps=("default",),
    ),
    Goal(
        "lowpass (32, 256, 56, 56), fwd+bwd, over eager",
        _speedup(f"{LOWPASS}-fwd+bwd"),
        10,
        "x",
        heaps=("kept",),
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
            Goal(f"info_nce B = 4096, D = {dim}, fwd+bwd, of the GEMM rate", _percent_of_floor(case), 90, "%"),
            Goal(
                f"info_nce B = 4096, D = {dim}, fwd+bwd, memory beyond inputs and gradients",
                _mebibytes(case),
                32,
                "MiB",
                at_least=False,
                heaps=("default",),
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
        heaps=("default",),
    ),
    Goal(
        "call of lowpass, fwd",
        _microseconds("overhead-lowpass-2x8x8x8-float32-fwd"),
        20,
        "us",
        at_least=False,
    ),
    Goal("call of info_nce, fwd", _microseconds("overhead-info_nce-2x8-float32-fwd"), 20, "us", at_least=False),
)
