"""Breaks down the time of one case on this machine: `lfcc bench --explain CASE`.

The floor is the time of the counted bytes and FLOPs at the measured ceilings. Further parts are measured separately:
launches, the time of the same call on tiny shapes or, on a GPU, the time in which no kernel runs; page faults of new
memory on a CPU; conversions, the own time of operators that copy; recomputed products, at the measured GEMM rate. The
parts may overlap. The rest is work below the ceilings.
"""

import difflib
import itertools
import mmap
import re
import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEventAvg
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lfcc_kernels.bench.cases import SUITES, Case, Step, variants
from lfcc_kernels.bench.harness import Benchmark
from lfcc_kernels.bench.machine import Machine, open_machine
from lfcc_kernels.bench.record import Request, Row

COPIES = ("aten::copy_", "aten::_to_copy", "aten::contiguous", "aten::clone")
_NODE = re.compile(r"(?:autograd::engine::evaluate_function: )?GeneratedBackwardFor_lfcc_(\w+)_[a-z]+?(Backward)?$")
# FLOPs over rows x keys x columns (ops/info_nce.py), and where the student is among the arguments.
_CONTRASTS = {
    torch.ops.lfcc.info_nce: (2, 0),
    torch.ops.lfcc.info_nce_one_pass: (4, 0),
    torch.ops.lfcc.info_nce_foreach: (4, 0),
    torch.ops.lfcc.info_nce_grad: (4, 1),
}
PROFILED = 5  # calls
TOP = 8  # operators

Line = tuple[str, float, str]  # name, milliseconds, note


def explain(case_name: str, request: Request) -> str:
    """Measure one case and return the breakdown of its time as plain text.

    Args:
        case_name: The name of the case, or a part that no other case's name contains.
        request: dtype, backend and size; its suites, peers and words are ignored.

    Raises:
        ValueError: no case has that name, or several do.
    """
    machine = open_machine(request.device, request.size)
    case, twin = _find(case_name, request, machine)
    try:
        benchmark = Benchmark(case, request, machine)
        benchmark.run()
        rows = {row.candidate: row for row in benchmark.rows({})}
        if rows["lfcc"].median_ms is None:
            return f"{case.name}: lfcc {rows['lfcc'].status}, {rows['lfcc'].note}"
        breakdown = _Breakdown(benchmark, rows["lfcc"], rows["eager"])
    finally:
        case.close()  # before the twin starts: both may use ranks of this process
    return breakdown.text(twin)


class ProductFlops(TorchDispatchMode):
    """Counts the FLOPs of products in lfcc's ops and in torch's. torch's own counter does not support autograd.grad."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, packet = func(*args, **(kwargs or {})), func.overloadpacket
        if packet in _CONTRASTS:
            factor, student = _CONTRASTS[packet]
            rows, keys = ([x] if isinstance(x, torch.Tensor) else x for x in args[student : student + 2])
            self.flops += factor * sum(s.numel() * len(t) for s, t in zip(rows, keys, strict=True))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


class _Breakdown:
    """Measures the parts of a call, in addition to the times of the benchmark, and formats them."""

    def __init__(self, benchmark: Benchmark, lfcc: Row, eager: Row) -> None:
        self.case, self.machine, self.lfcc, self.eager = benchmark.case, benchmark.machine, lfcc, eager
        self.entry, self.turns = benchmark.lfcc, itertools.cycle(benchmark.lfcc.inputs)
        self.rounds = max(5, min(30, int(1e3 / lfcc.median_ms)))
        self.events = self._profile()
        self.beyond = [*self._page_faults(), self._conversions(), *self._recompute()]
        self.passes = self._passes()

    def text(self, twin: Case) -> str:
        case, lfcc = self.case, self.lfcc
        floors = [_floor(step, lfcc) for step in case.steps]
        beyond = [self._launches(twin), *self.beyond]
        rest = lfcc.median_ms - sum(ms for _, ms, _ in floors) - sum(ms for _, ms, _ in beyond)
        rest_note = "negative: parts overlap" if rest < 0 else "the rest"
        fraction = "" if lfcc.fraction_of_floor is None else f", {lfcc.fraction_of_floor:.0%} of the floor"
        eager = f"eager {self.eager.median_ms:.4g} ms" if self.eager.median_ms else f"eager {self.eager.status}"
        parts = {
            "floor": floors or [("nothing counted", 0.0, "")],
            "beyond the floor": [*beyond, ("below the ceilings", rest, rest_note)],
            "by pass": self.passes,
            f"by operator, own time in a profile of {PROFILED} calls": self._operators(),
        }
        head = (
            f"{case.name} on {self.machine.name()}, {lfcc.run}\n"
            f"lfcc ({lfcc.backend}) {lfcc.median_ms:.4g} ms, 20 to 80 % of {lfcc.rounds} rounds: "
            f"{lfcc.q20_ms:.4g} to {lfcc.q80_ms:.4g}{fraction}; {eager}\n"
            f"counted: {lfcc.formula or 'nothing'}; {lfcc.bytes / 1e6:.4g} MB and {lfcc.flops / 1e9:.4g} GFLOP"
        )
        return "\n\n".join([head, *(self._section(title, lines) for title, lines in parts.items() if lines)])

    def _section(self, title: str, lines: Sequence[Line]) -> str:
        width, percent = max(24, *(len(name) for name, _, _ in lines)), 100 / self.lfcc.median_ms
        texts = (f"  {name:<{width}}{ms:>11.4f} ms{percent * ms:>7.1f} %  {note}".rstrip() for name, ms, note in lines)
        return "\n".join([title, *texts])

    def _step(self) -> tuple[torch.Tensor, ...]:
        return self.case.run(self.entry.call, next(self.turns), self.entry.upstream)

    def _profile(self) -> EventList:
        """Events by name."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.machine.gpu else [])]
        with profile(activities=activities) as profiler:
            for _ in range(PROFILED):
                self._step()
            if self.machine.gpu:
                torch.cuda.synchronize()
        return profiler.key_averages()

    def _launches(self, twin: Case) -> Line:
        tiny = self._least_milliseconds(twin)
        of_tiny = f"a call of shape {'x'.join(map(str, twin.shape))}"
        if not self.machine.gpu:
            return "launches", tiny, f"fastest time of {of_tiny}"
        kernels = [e for e in self.events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        count = sum(kernel.count for kernel in kernels) / PROFILED
        busy = sum(kernel.self_device_time_total for kernel in kernels) / 1e3 / PROFILED
        note = f"{count:g} kernels and copies take {busy:.4g} ms; the host needs {tiny:.4g} ms for {of_tiny}"
        return "launches", max(0.0, self.lfcc.median_ms - busy), note

    def _page_faults(self) -> list[Line]:
        if self.machine.gpu:
            return []

        def count() -> int:
            before = _faults()
            self._step()
            return _faults() - before

        faults = statistics.median(count() for _ in range(self.rounds))
        cost = _milliseconds_per_fault(self.machine)
        return [("page faults", faults * cost, f"{faults:,.0f} at {1e3 * cost:.3g} us")]

    def _conversions(self) -> Line:
        copies = [event for event in self.events if event.key in COPIES]
        calls = sum(event.count for event in copies if event.key == "aten::copy_") / PROFILED
        return "conversions", sum(map(self._own_ms, copies)), f"{calls:g} copies"

    def _recompute(self) -> list[Line]:
        if not self.case.steps or not self.lfcc.flops:
            return []
        with ProductFlops() as done:
            self._step()
        note = f"{done.flops / 1e9:.4g} GFLOP computed, {done.flops / self.lfcc.flops:.3g} of the least"
        return [("recompute", max(0, done.flops - self.lfcc.flops) / self.lfcc.gemm_gflops / 1e6, note)]

    def _passes(self) -> list[Line]:
        if self.case.mode == "fwd":
            return []

        def median(call: Callable[[], object]) -> float:
            seconds = (self.machine.seconds(call, head_start=self.entry.head_start) for _ in range(self.rounds))
            return 1e3 * statistics.median(seconds)

        forward = median(lambda: self.entry.call(*next(self.turns)))
        return [("forward", forward, "with a graph"), ("backward", median(self._step) - forward, "the rest of a call")]

    def _operators(self) -> list[Line]:
        operators: dict[str, tuple[float, float]] = {}
        for event in self.events:
            if event.device_type == DeviceType.CPU:
                # Autograd's node of an op and the op itself are the same call.
                name = _NODE.sub(r"lfcc::\1 \2", event.key).strip()
                ms, calls = operators.get(name, (0.0, 0.0))
                operators[name] = ms + self._own_ms(event), max(calls, event.count / PROFILED)
        lines = [(name, ms, f"{calls:g} calls") for name, (ms, calls) in operators.items()]
        return sorted((line for line in lines if line[1] > 1e-3 * self.lfcc.median_ms), key=lambda line: -line[1])[:TOP]

    def _own_ms(self, event: FunctionEventAvg) -> float:
        """Own time of an operator per call; on a GPU that of the kernels it launches itself."""
        total = event.self_device_time_total if self.machine.gpu else event.self_cpu_time_total
        return total / 1e3 / PROFILED

    def _least_milliseconds(self, case: Case) -> float:
        """The fastest call of lfcc by the host's clock."""
        try:
            call, inputs = case.candidates["lfcc"], case.inputs()
            step = partial(case.run, call, inputs, torch.ones_like(call(*inputs)).detach())
            calls = 20 if self.machine.gpu else 1  # timings of several calls use the host's clock on any device
            return 1e3 * min(self.machine.seconds(step, calls) for _ in range(30))
        finally:
            case.close()


def _find(name: str, request: Request, machine: Machine) -> tuple[Case, Case]:
    """The case, with lfcc and eager alone, and the same case on tiny shapes."""
    request = replace(request, suites=list(SUITES))
    cases, twins = variants(request, machine), variants(request, machine.with_tiny_shapes())
    pairs = {case.name: (case, twin) for case, twin in zip(cases, twins, strict=True)}
    found = [name] if name in pairs else [known for known in pairs if name in known]
    if len(found) > 1:
        raise ValueError(f"bench --explain: several case names contain {name!r}: {', '.join(found[:10])}")
    if not found:
        close = ", ".join(difflib.get_close_matches(name, pairs, n=5, cutoff=0))
        raise ValueError(f"bench --explain: no case name contains {name!r}; the closest are {close}")
    case, twin = pairs[found[0]]
    return replace(case, candidates={key: case.candidates[key] for key in ("lfcc", "eager")}), twin


def _floor(step: Step, row: Row) -> Line:
    moving, computing = step.bytes / row.copy_gbps / 1e6, step.flops / row.gemm_gflops / 1e6
    if moving > computing:
        return "bytes", moving, f"{step.bytes / 1e6:.4g} MB at {row.copy_gbps:.4g} GB/s"
    return "products", computing, f"{step.flops / 1e9:.4g} GFLOP at {row.gemm_gflops:.4g} GFLOP/s"


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _milliseconds_per_fault(machine: Machine) -> float:
    """The extra time of writing new memory over writing it again with torch's threads, divided by the faults."""
    costs = []
    for _ in range(3):
        fresh = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory, before = torch.frombuffer(fresh, dtype=torch.uint8), _faults()
        first = machine.seconds(partial(memory.fill_, 1))
        faults = _faults() - before
        costs.append(1e3 * (first - machine.seconds(partial(memory.fill_, 2))) / max(1, faults))
    return max(0.0, min(costs))
