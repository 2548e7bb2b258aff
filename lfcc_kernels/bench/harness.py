"""Times the candidates of a case: each is checked once against the reference, then all run in turn, round by round."""

import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lfcc_kernels.bench.cases import Candidate, Case, WithConversion, backend_of
from lfcc_kernels.bench.machine import Machine
from lfcc_kernels.bench.record import BASELINE, Request, Row

Inputs = tuple[Tensor, ...]
SKIPPED = (ImportError, NotImplementedError)  # raised by a candidate that cannot run here


@dataclass
class Entry:
    """One candidate and its measurements. Lists have one value per round."""

    call: Candidate  # the timed function
    inputs: list[Inputs]  # those of the case, or converted by `convert`
    convert: Callable[[Tensor], Tensor] | None = None
    upstream: Tensor | None = None  # gradient of the result, in this candidate's layout
    status: str = "ok"
    note: str = ""
    error: float | None = None
    stride: int = 1  # it runs in every `stride`-th round
    head_start: float = 0.0  # seconds the host needs to enqueue a timing
    replay: Callable[[], None] | None = None  # all calls of a timing, if the device has captured them
    seconds: list[float] = field(default_factory=list)  # per call
    fractions: list[float] = field(default_factory=list)  # of the floor, at the ceilings measured last
    conversions: list[float] = field(default_factory=list)  # seconds to convert one set of inputs


class Benchmark:
    """The candidates of one case. `run` times them, `rows` returns the results."""

    def __init__(self, case: Case, request: Request, machine: Machine) -> None:
        torch._dynamo.reset()  # a function compiled for many shapes would be recompiled for dynamic ones
        torch.manual_seed(0)
        self.case, self.request, self.machine = case, request, machine
        self._load_average, self._clock_mhz = os.getloadavg()[0], machine.clock_mhz()
        first = case.inputs()
        self._inputs = [first, *(case.inputs() for _ in range(self._input_sets(first) - 1))]
        self._turns = itertools.cycle(range(len(self._inputs)))
        self._captured = list(range(len(self._inputs))) * math.ceil(10 / len(self._inputs))  # input sets of a replay
        self._round = 0
        self._copy_gbps: list[float] = []
        self._gemm_gflops: list[float] = []
        self._reference = torch.float64 if _bytes(first) <= machine.float64_limit else case.dtype
        self.entries = {name: Entry(call, self._inputs) for name, call in case.candidates.items()}
        self._check()
        if case.baseline:
            self.entries[BASELINE] = Entry(case.baseline, self._inputs, upstream=self.lfcc.upstream)
        self._plan()

    @property
    def lfcc(self) -> Entry:
        return self.entries["lfcc"]

    def run(self) -> None:
        """All rounds."""
        for _ in range(self.rounds):
            self.run_peers()
            self.run_lfcc()

    def run_peers(self) -> None:
        """One round of every peer whose turn it is; measures the ceilings in every round, or in five of them."""
        if self.case.steps and self._round % math.ceil(self.rounds / 5) == 0:
            self._copy_gbps.append(self.machine.copy_gbps())
            self._gemm_gflops.append(self.machine.gemm_gflops(self.case.dtype))
        peers = [entry for entry in self._alive() if entry is not self.lfcc]
        first = self._round % max(1, len(peers))
        for entry in peers[first:] + peers[:first]:
            if self._round % entry.stride == 0:
                self._time(entry)
        self._round += 1

    def run_lfcc(self) -> None:
        if self.lfcc.status == "ok":
            self._time(self.lfcc)

    def peak_memory(self) -> dict[str, int]:
        """Peak memory of the timed candidates, if the case or the machine asks for it."""
        if not (self.case.memory or self.machine.memory_of_all):
            return {}
        calls = {
            name: partial(self.case.run, call, self._inputs[0], self.entries[name].upstream)
            for name, call in self.case.candidates.items()
            if self.entries[name].status == "ok"
        }
        return self.machine.peak_memory(self.request, self.case.name, calls)

    def rows(self, peak_memory: dict[str, int]) -> list[Row]:
        """The rows of the record, one per candidate."""
        case, eager = self.case, _median(self.entries["eager"].seconds)
        without = _median(self.entries[BASELINE].seconds) if case.baseline else None
        rows = []
        for name, entry in self.entries.items():
            median, q20, q80 = (_milliseconds(entry.seconds, q) for q in (0.5, 0.2, 0.8))
            call = case.candidates.get(name)
            rows.append(
                Row(
                    **case_fields(case, self.machine),
                    candidate=name,
                    backend=self._backend(name),
                    status=entry.status,
                    note=entry.note,
                    error=entry.error,
                    reference=str(self._reference).removeprefix("torch."),
                    rounds=len(entry.seconds),
                    median_ms=median,
                    q20_ms=q20,
                    q80_ms=q80,
                    conversion=call.conversion if isinstance(call, WithConversion) else "",
                    conversion_ms=_milliseconds(entry.conversions, 0.5),
                    share_of_step=1 - without * 1e3 / median if without and median else None,
                    input_copies=len(self._inputs),
                    copy_gbps=_median(self._copy_gbps),
                    gemm_gflops=_median(self._gemm_gflops),
                    fraction_of_floor=_median(entry.fractions),
                    speedup_over_eager=eager * 1e3 / median if eager and median else None,
                    peak_memory_bytes=peak_memory.get(name),
                    load_average=self._load_average,
                    clock_mhz=self._clock_mhz,
                )
            )
        return rows

    def _alive(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.status == "ok"]

    def _backend(self, candidate: str) -> str:
        selected = backend_of(self.case, self.request, self.machine)
        return selected if candidate == "lfcc" else candidate.partition("lfcc, ")[2]

    def _input_sets(self, first: Inputs) -> int:
        """Sets of inputs that together have twice the size of the last-level cache; 1 if a timing repeats calls."""
        if self.case.calls > 1 or self.machine.tiny:
            return 1
        return math.ceil(2 * self.machine.cache_bytes() / _bytes(first))

    def _check(self) -> None:
        """Run every candidate once against the reference; those that raise or deviate are not timed."""
        case, inputs = self.case, self._inputs[0]
        upstream = torch.randn_like(self.entries["eager"].call(*inputs))
        expected = self._expected(upstream)
        tolerance = case.tolerance or self.machine.tolerance[case.dtype]
        for entry in self.entries.values():
            with _attempt(entry):
                entry.upstream = torch.empty_like(entry.call(*inputs)).copy_(upstream)
                results = case.run(entry.call, inputs, entry.upstream)
                error = max(_deviation(got, right) for got, right in zip(results, expected, strict=True))
                del results
                entry.error = error if math.isfinite(error) else None
                if error > tolerance:
                    entry.status, entry.note = "wrong", f"deviates by {error:.1e} of the largest value"
                elif isinstance(entry.call, WithConversion):
                    entry.convert, entry.call = entry.call.convert, entry.call.call
                    entry.inputs = [_leaves(some, entry.convert) for some in self._inputs]

    def _expected(self, upstream: Tensor) -> tuple[Tensor, ...]:
        """Result and gradients of eager in float64, or in the case's dtype if float64 needs too much memory."""
        eager = self.entries["eager"].call
        eager = eager.call if isinstance(eager, WithConversion) else eager  # it would convert back
        inputs = _leaves(self._inputs[0], lambda x: x.to(self._reference) if x.is_floating_point() else x)
        try:
            return self.case.run(eager, inputs, upstream.to(self._reference))
        except torch.OutOfMemoryError:
            if self._reference == self.case.dtype:
                raise
        self._reference = self.case.dtype
        return self._expected(upstream)

    def _plan(self) -> None:
        """Choose the number of rounds. Peers over 10 times slower run in every second, over 30 in every fourth."""
        for entry in self._alive():
            with _attempt(entry):
                entry.head_start = self.machine.host_seconds(partial(self._step, entry))
        estimates = self._estimates()
        if estimates and self.case.calls == 1 and min(estimates.values()) < self.machine.graph_below:
            for entry in self._alive():
                self._capture(entry)
            estimates = self._estimates()
        seconds_per_round = 0.0
        for name, seconds in estimates.items():
            entry = self.entries[name]
            slowness = seconds / min(estimates.values())
            entry.stride = 4 if slowness > 30 else 2 if slowness > 10 else 1
            calls = len(self._captured) if entry.replay else self.case.calls
            seconds_per_round += (seconds * calls + entry.head_start) / entry.stride
        self.rounds = self.machine.rounds(seconds_per_round) if seconds_per_round else 0

    def _estimates(self) -> dict[str, float]:
        estimates = {}
        for name, entry in self.entries.items():
            if entry.status == "ok":
                with _attempt(entry):
                    estimates[name] = self._seconds(entry)
        return estimates

    def _capture(self, entry: Entry) -> None:
        calls = [partial(self.case.run, entry.call, entry.inputs[turn], entry.upstream) for turn in self._captured]
        try:
            entry.replay = self.machine.capture(calls)
            entry.head_start = self.machine.host_seconds(entry.replay)
            entry.note = f"replays of {len(calls)} captured calls"
        except Exception as error:  # falls back to timing single calls
            entry.note = f"not captured: {reason(error)}"

    def _time(self, entry: Entry) -> None:
        with _attempt(entry):
            entry.seconds.append(self._seconds(entry))
            if self.case.steps:
                copy, gemm = self._copy_gbps[-1], self._gemm_gflops[-1]
                floor = sum(max(step.bytes / copy, step.flops / gemm) for step in self.case.steps) / 1e9
                entry.fractions.append(floor / entry.seconds[-1])
            if entry.convert:
                entry.conversions.append(self.machine.seconds(partial(self._convert, entry)))

    def _seconds(self, entry: Entry) -> float:
        """Time per call."""
        if entry.replay:
            return self.machine.seconds(entry.replay, head_start=entry.head_start) / len(self._captured)
        return self.machine.seconds(partial(self._step, entry), self.case.calls, entry.head_start)

    def _step(self, entry: Entry) -> tuple[Tensor, ...]:
        return self.case.run(entry.call, entry.inputs[next(self._turns)], entry.upstream)

    def _convert(self, entry: Entry) -> Sequence[Tensor]:
        """The conversion of the inputs and of their gradients back, as a user of this candidate needs them."""
        inputs = self._inputs[next(self._turns)]
        if self.case.mode == "fwd":
            with torch.no_grad():
                return [entry.convert(x) for x in inputs]
        learn = [x for x in inputs if x.requires_grad]
        converted = [entry.convert(x) for x in learn]
        frozen = [entry.convert(x) for x in inputs if not x.requires_grad]
        return [*torch.autograd.grad(converted, learn, [x.detach() for x in converted]), *frozen]


@contextmanager
def _attempt(entry: Entry) -> Iterator[None]:
    """On any exception: note the reason and drop the candidate's times, so that the others continue."""
    try:
        yield
    except Exception as error:
        entry.status = "skipped" if isinstance(error, SKIPPED) else "failed"
        entry.note = reason(error)
        entry.seconds, entry.fractions, entry.conversions = [], [], []


def case_fields(case: Case, machine: Machine) -> dict:
    """The fields of a row that do not depend on the candidate."""
    return {name: getattr(case, name) for name in ["suite", "label", "mode", "axis", "x", "op", "size", "formula"]} | {
        "case": case.name,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "run": machine.run,
        "bytes": sum(step.bytes for step in case.steps),
        "flops": sum(step.flops for step in case.steps),
    }


def reason(error: Exception) -> str:
    """The error in one line; for a skipped candidate the message alone."""
    kind = "" if isinstance(error, SKIPPED) else f"{type(error).__name__}: "
    return f"{kind}{error}".partition("\n")[0][:200]


def _leaves(inputs: Inputs, convert: Callable[[Tensor], Tensor]) -> Inputs:
    """Converted inputs without history that require the same gradients."""
    return tuple(convert(x.detach()).requires_grad_(x.requires_grad) for x in inputs)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _deviation(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    got, expected = got.double(), expected.double()
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    deviation = ((got - expected).abs().max() / scale).item()
    return math.inf if math.isnan(deviation) else deviation


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _milliseconds(seconds: Sequence[float], quantile: float) -> float | None:
    return torch.tensor(seconds, dtype=torch.float64).quantile(quantile).item() * 1e3 if seconds else None
