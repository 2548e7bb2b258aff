"""Takes the times: every candidate of a case is checked once, then all run in turn, round by round."""

import gc
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.cases import Candidate, Case
from benchmarks.record import Row

# A case gets as many rounds as fit in this time, within these bounds.
SECONDS, ROUNDS = (0.0, (3, 3)) if machine.TINY else (1.5, (7, 50))

# Results may deviate from the reference by this much of its largest value: rounding, not another formula.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

# Above this many bytes of inputs the reference is eager in the case's dtype; float64 would take gigabytes.
FLOAT64_LIMIT = 256 << 20


@dataclass
class Entry:
    """One candidate and what became of it."""

    call: Candidate
    upstream: Tensor | None = None  # gradient of the result, laid out as this candidate lays out its result
    status: str = "ok"
    note: str = ""
    error: float | None = None
    every: int = 1  # it runs once in so many rounds
    seconds: list[float] = field(default_factory=list)  # of one call, round by round
    fractions: list[float] = field(default_factory=list)  # of the floor at the ceilings measured last, likewise


class Contest:
    """The candidates of one case: call `run_peers`, `run_ours` in turn for `rounds` rounds, then `rows`."""

    def __init__(self, case: Case) -> None:
        torch._dynamo.reset()  # a function compiled for many shapes would be recompiled for any
        torch.manual_seed(0)
        self.case = case
        first = case.inputs()
        self._inputs = [first, *(case.inputs() for _ in range(_copies(case, first) - 1))]
        self._turn = self._round = 0
        self._copy_gbps: list[float] = []
        self._gemm_gflops: list[float] = []
        self.entries = {name: Entry(call) for name, call in case.candidates.items()}
        self._check()
        self._plan()

    @property
    def ours(self) -> Entry:
        return self.entries["ours"]

    def run_peers(self) -> None:
        """Run every peer whose turn it is, and in every round, or in ten of them, measure the ceilings."""
        if self.case.steps and self._round % math.ceil(self.rounds / 10) == 0:
            self._copy_gbps.append(machine.copy_gbps())
            self._gemm_gflops.append(machine.gemm_gflops())
        peers = [entry for entry in self.entries.values() if entry is not self.ours and entry.status == "ok"]
        first = self._round % max(1, len(peers))
        for entry in peers[first:] + peers[:first]:
            if self._round % entry.every == 0:
                self._run(entry)
        self._round += 1

    def run_ours(self) -> None:
        self._run(self.ours)

    def rows(self, peak_memory: dict[str, int]) -> list[Row]:
        """The rows of the results file, one a candidate."""
        case, eager = self.case, _median(self.entries["eager"].seconds)
        rows = []
        for name, entry in self.entries.items():
            median, q20, q80 = (_milliseconds(entry.seconds, q) for q in (0.5, 0.2, 0.8))
            rows.append(
                Row(
                    case=case.name,
                    suite=case.suite,
                    label=case.label,
                    shape=list(case.shape),
                    dtype=str(case.dtype).removeprefix("torch."),
                    mode=case.mode,
                    heap=machine.heap(),
                    candidate=name,
                    status=entry.status,
                    note=entry.note,
                    error=entry.error,
                    reference=str(self._reference_dtype()).removeprefix("torch."),
                    rounds=len(entry.seconds),
                    median_ms=median,
                    q20_ms=q20,
                    q80_ms=q80,
                    input_copies=len(self._inputs),
                    bytes=sum(step.bytes for step in case.steps),
                    flops=sum(step.flops for step in case.steps),
                    formula=case.formula,
                    copy_gbps=_median(self._copy_gbps),
                    gemm_gflops=_median(self._gemm_gflops),
                    fraction_of_floor=_median(entry.fractions),
                    speedup_over_eager=eager * 1e3 / median if eager and median else None,
                    peak_memory_bytes=peak_memory.get(name),
                )
            )
        return rows

    def _check(self) -> None:
        """Run every candidate once against the reference; those that raise or disagree are not timed."""
        case, inputs, dtype = self.case, self._inputs[0], self._reference_dtype()
        eager = self.entries["eager"].call
        raised = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs]
        upstream = torch.randn_like(eager(*inputs))
        expected = step(case, eager, raised, upstream.to(dtype))
        for entry in self.entries.values():
            try:
                entry.upstream = torch.empty_like(entry.call(*inputs)).copy_(upstream)
                results = step(case, entry.call, inputs, entry.upstream)
            except Exception as error:  # a peer may fail in any way, and the others go on
                entry.status, entry.note = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            error = max(_deviation(got, right) for got, right in zip(results, expected, strict=True))
            entry.error = error if math.isfinite(error) else None
            if error > TOLERANCE[case.dtype]:
                entry.status, entry.note = "wrong", f"deviates by {error:.1e} of the largest value"

    def _plan(self) -> None:
        """Rounds for the time there is; a peer ten times slower than ours runs in every other one."""
        alive = [entry for entry in self.entries.values() if entry.status == "ok"]
        seconds = [self._seconds(entry) for entry in alive]
        for entry, estimate in zip(alive, seconds, strict=True):
            entry.every = 2 if estimate > 10 * seconds[0] else 1
        a_round = sum(s / entry.every for entry, s in zip(alive, seconds, strict=True)) * self.case.calls
        self.rounds = min(ROUNDS[1], max(ROUNDS[0], int(SECONDS / a_round)))

    def _run(self, entry: Entry) -> None:
        entry.seconds.append(self._seconds(entry))
        if self.case.steps:
            copy, gemm = self._copy_gbps[-1], self._gemm_gflops[-1]
            floor = sum(max(step.bytes / copy, step.flops / gemm) for step in self.case.steps) / 1e9
            entry.fractions.append(floor / entry.seconds[-1])

    def _reference_dtype(self) -> torch.dtype:
        return torch.float64 if _bytes(self._inputs[0]) <= FLOAT64_LIMIT else self.case.dtype

    def _seconds(self, entry: Entry) -> float:
        """Time of one call. Giving its results back is not in it."""
        inputs = self._inputs[self._turn % len(self._inputs)]
        self._turn += 1
        gc.disable()
        try:
            start = time.perf_counter()
            for _ in range(self.case.calls):
                results = step(self.case, entry.call, inputs, entry.upstream)
            seconds = (time.perf_counter() - start) / self.case.calls
        finally:
            gc.enable()
        del results
        return seconds


def step(case: Case, call: Candidate, inputs: Sequence[Tensor], upstream: Tensor | None) -> tuple[Tensor, ...]:
    """One call in the case's mode: the result, and with "fwd+bwd" the gradients of all that wants one."""
    if case.mode == "fwd":
        with torch.no_grad():
            return (call(*inputs),)
    result = call(*inputs)
    learn = [x for x in (*inputs, *case.parameters) if x.requires_grad]
    return result.detach(), *torch.autograd.grad(result, learn, upstream)


def _copies(case: Case, inputs: Sequence[Tensor]) -> int:
    """Sets of inputs that together are twice the last cache; one where a timing repeats calls."""
    if case.calls > 1 or machine.TINY:
        return 1
    return math.ceil(2 * machine.last_cache() / _bytes(inputs))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _deviation(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    got, expected = got.double(), expected.double()
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    deviation = ((got - expected).abs().max() / scale).item()
    return math.inf if math.isnan(deviation) else deviation


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _milliseconds(seconds: Sequence[float], quantile: float) -> float | None:
    return torch.tensor(seconds, dtype=torch.float64).quantile(quantile).item() * 1e3 if seconds else None
