"""Takes the times: every candidate of a case is checked once, then all run in turn, round by round."""

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

from lfcc_kernels.bench import machine
from lfcc_kernels.bench.cases import Candidate, Case, Converting, serving
from lfcc_kernels.bench.record import BASELINE, Request, Row

Inputs = tuple[Tensor, ...]
SKIPPED = (ImportError, NotImplementedError)  # what a candidate raises that cannot run here


@dataclass
class Entry:
    """One candidate and what became of it."""

    call: Candidate  # what is timed
    inputs: list[Inputs]  # on these: the case's, or what `convert` has made of them
    convert: Callable[[Tensor], Tensor] | None = None
    upstream: Tensor | None = None  # gradient of the result, laid out as this candidate lays out its result
    status: str = "ok"
    note: str = ""
    error: float | None = None
    every: int = 1  # it runs once in so many rounds
    head_start: float = 0.0  # seconds the host needs to enqueue a timing
    replay: Callable[[], None] | None = None  # the calls of a timing at once, where the device has captured them
    seconds: list[float] = field(default_factory=list)  # of one call, round by round
    fractions: list[float] = field(default_factory=list)  # of the floor at the ceilings measured last, likewise
    conversions: list[float] = field(default_factory=list)  # seconds that converting one set of inputs takes, likewise


class Contest:
    """The candidates of one case: call `run_peers`, `run_ours` in turn for `rounds` rounds, then `rows`."""

    def __init__(self, case: Case, request: Request) -> None:
        torch._dynamo.reset()  # a function compiled for many shapes would be recompiled for any
        torch.manual_seed(0)
        self.case, self.request = case, request
        self._load_average, self._clock_mhz = os.getloadavg()[0], machine.HERE.clock_mhz()
        first = case.inputs()
        self._inputs = [first, *(case.inputs() for _ in range(_copies(case, first) - 1))]
        self._turns = itertools.cycle(range(len(self._inputs)))
        # The sets of inputs whose calls one replay does.
        self._captured = list(range(len(self._inputs))) * math.ceil(10 / len(self._inputs))
        self._round = 0
        self._copy_gbps: list[float] = []
        self._gemm_gflops: list[float] = []
        self._reference = torch.float64 if _bytes(first) <= machine.HERE.float64_limit else case.dtype
        self.entries = {name: Entry(call, self._inputs) for name, call in case.candidates.items()}
        self._check()
        if case.baseline:
            self.entries[BASELINE] = Entry(case.baseline, self._inputs, upstream=self.ours.upstream)
        self._plan()

    @property
    def ours(self) -> Entry:
        return self.entries["ours"]

    def play(self) -> None:
        """All rounds."""
        for _ in range(self.rounds):
            self.run_peers()
            self.run_ours()

    def run_peers(self) -> None:
        """Run every peer whose turn it is, and measure the ceilings in every round, or in five of them."""
        if self.case.steps and self._round % math.ceil(self.rounds / 5) == 0:
            self._copy_gbps.append(machine.HERE.copy_gbps())
            self._gemm_gflops.append(machine.HERE.gemm_gflops(self.case.dtype))
        peers = [entry for entry in self._alive() if entry is not self.ours]
        first = self._round % max(1, len(peers))
        for entry in peers[first:] + peers[:first]:
            if self._round % entry.every == 0:
                self._run(entry)
        self._round += 1

    def run_ours(self) -> None:
        if self.ours.status == "ok":
            self._run(self.ours)

    def peaks(self) -> dict[str, int]:
        """Peak memory of the candidates that are worth a time, where the case or the machine has it measured."""
        if not (self.case.memory or machine.HERE.weighs_all):
            return {}
        calls = {
            name: partial(self.case.run, call, self._inputs[0], self.entries[name].upstream)
            for name, call in self.case.candidates.items()
            if self.entries[name].status == "ok"
        }
        return machine.HERE.peak_memory(self.request, self.case.name, calls)

    def rows(self, peak_memory: dict[str, int]) -> list[Row]:
        """The rows of the record, one a candidate."""
        case, eager = self.case, _median(self.entries["eager"].seconds)
        without = _median(self.entries[BASELINE].seconds) if case.baseline else None
        rows = []
        for name, entry in self.entries.items():
            median, q20, q80 = (_milliseconds(entry.seconds, q) for q in (0.5, 0.2, 0.8))
            call = case.candidates.get(name)
            rows.append(
                Row(
                    **about(case),
                    candidate=name,
                    backend=_backend(name, case, self.request),
                    status=entry.status,
                    note=entry.note,
                    error=entry.error,
                    reference=str(self._reference).removeprefix("torch."),
                    rounds=len(entry.seconds),
                    median_ms=median,
                    q20_ms=q20,
                    q80_ms=q80,
                    conversion=call.conversion if isinstance(call, Converting) else "",
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

    def _check(self) -> None:
        """Run every candidate once against the reference; those that raise or disagree are not timed."""
        case, inputs = self.case, self._inputs[0]
        upstream = torch.randn_like(self.entries["eager"].call(*inputs))
        expected = self._expected(upstream)
        tolerance = case.tolerance or machine.HERE.tolerance[case.dtype]
        for entry in self.entries.values():
            with _attempt(entry):
                entry.upstream = torch.empty_like(entry.call(*inputs)).copy_(upstream)
                results = case.run(entry.call, inputs, entry.upstream)
                error = max(_deviation(got, right) for got, right in zip(results, expected, strict=True))
                del results
                entry.error = error if math.isfinite(error) else None
                if error > tolerance:
                    entry.status, entry.note = "wrong", f"deviates by {error:.1e} of the largest value"
                elif isinstance(entry.call, Converting):
                    entry.call, entry.convert = entry.call.call, entry.call.convert
                    entry.inputs = [_leaves(some, entry.convert) for some in self._inputs]

    def _expected(self, upstream: Tensor) -> tuple[Tensor, ...]:
        """Result and gradients of eager in float64, or in the case's dtype where that takes too much memory."""
        eager = self.entries["eager"].call
        eager = eager.call if isinstance(eager, Converting) else eager  # it would convert back
        raised = _leaves(self._inputs[0], lambda x: x.to(self._reference) if x.is_floating_point() else x)
        try:
            return self.case.run(eager, raised, upstream.to(self._reference))
        except torch.OutOfMemoryError:
            if self._reference == self.case.dtype:
                raise
        self._reference = self.case.dtype
        return self._expected(upstream)

    def _plan(self) -> None:
        """Rounds for the time there is; peers over ten, or thirty times slower run in a half, or a quarter of them."""
        for entry in self._alive():
            with _attempt(entry):
                entry.head_start = machine.HERE.host_seconds(partial(self._step, entry))
        estimates = self._estimates()
        if estimates and self.case.calls == 1 and min(estimates.values()) < machine.HERE.graph_below:
            for entry in self._alive():
                self._capture(entry)
            estimates = self._estimates()
        a_round = 0.0
        for name, seconds in estimates.items():
            entry = self.entries[name]
            slowness = seconds / min(estimates.values())
            entry.every = 4 if slowness > 30 else 2 if slowness > 10 else 1
            calls = len(self._captured) if entry.replay else self.case.calls
            a_round += (seconds * calls + entry.head_start) / entry.every
        self.rounds = machine.HERE.rounds(a_round) if a_round else 0

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
            entry.replay = machine.HERE.capture(calls)
            entry.head_start = machine.HERE.host_seconds(entry.replay)
            entry.note = f"replays of {len(calls)} captured calls"
        except Exception as error:  # it is timed call by call then
            entry.note = f"not captured: {reason(error)}"

    def _run(self, entry: Entry) -> None:
        with _attempt(entry):
            entry.seconds.append(self._seconds(entry))
            if self.case.steps:
                copy, gemm = self._copy_gbps[-1], self._gemm_gflops[-1]
                floor = sum(max(step.bytes / copy, step.flops / gemm) for step in self.case.steps) / 1e9
                entry.fractions.append(floor / entry.seconds[-1])
            if entry.convert:
                entry.conversions.append(machine.HERE.seconds(partial(self._convert, entry)))

    def _seconds(self, entry: Entry) -> float:
        """Time of one call."""
        if entry.replay:
            return machine.HERE.seconds(entry.replay, head_start=entry.head_start) / len(self._captured)
        return machine.HERE.seconds(partial(self._step, entry), self.case.calls, entry.head_start)

    def _step(self, entry: Entry) -> tuple[Tensor, ...]:
        return self.case.run(entry.call, entry.inputs[next(self._turns)], entry.upstream)

    def _convert(self, entry: Entry) -> Sequence[Tensor]:
        """What a user of this candidate does around it: the inputs' conversion, and that of their gradients back."""
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
    """A candidate may fail in any way: it keeps the reason, loses its times, and the others go on."""
    try:
        yield
    except Exception as error:
        entry.status = "skipped" if isinstance(error, SKIPPED) else "failed"
        entry.note = reason(error)
        entry.seconds, entry.fractions, entry.conversions = [], [], []


def about(case: Case) -> dict:
    """The fields of a row that do not depend on the candidate."""
    return {
        "case": case.name,
        "suite": case.suite,
        "label": case.label,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "mode": case.mode,
        "axis": case.axis,
        "x": case.x,
        "op": case.op,
        "size": case.size,
        "run": machine.HERE.run,
        "bytes": sum(step.bytes for step in case.steps),
        "flops": sum(step.flops for step in case.steps),
        "formula": case.formula,
    }


def _backend(candidate: str, case: Case, request: Request) -> str:
    if candidate == "ours":
        return serving(case, request)
    return candidate.removeprefix("ours, ") if candidate.startswith("ours, ") else ""


def _leaves(inputs: Inputs, convert: Callable[[Tensor], Tensor]) -> Inputs:
    """Converted inputs that have no history and want the gradients that the others want."""
    return tuple(convert(x.detach()).requires_grad_(x.requires_grad) for x in inputs)


def reason(error: Exception) -> str:
    """The error in a line; of a candidate that is skipped its message alone."""
    kind = "" if isinstance(error, SKIPPED) else f"{type(error).__name__}: "
    return f"{kind}{error}".partition("\n")[0][:200]


def _copies(case: Case, inputs: Sequence[Tensor]) -> int:
    """Sets of inputs that together are twice the last cache; one where a timing repeats calls."""
    if case.calls > 1 or machine.SIZE == "tiny":
        return 1
    return math.ceil(2 * machine.HERE.cache_bytes() / _bytes(inputs))


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
