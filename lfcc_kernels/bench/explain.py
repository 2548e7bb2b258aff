"""Where the time of one case goes, measured on this machine: `lfcc bench --explain CASE`.

The floor is what the counted bytes and FLOPs take at the measured ceilings. Beyond it come, each measured by itself:
launches, the time of the same call with tiny shapes, and on a GPU the time in which no kernel runs; page faults of
fresh memory on a CPU, at the cost of one; conversions, the own time of the operators that copy; recomputed products, at
the measured GEMM rate. They may overlap. What is left is work below the ceilings.
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

from lfcc_kernels.bench import machine
from lfcc_kernels.bench.cases import SUITES, Case, Step, variants
from lfcc_kernels.bench.harness import Contest
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

Line = tuple[str, float, str]  # what takes time, how many ms, and a note


def explain(case_name: str, request: Request) -> str:
    """Measure one case and say where its time goes, in plain text.

    Args:
        case_name: Of the case, or a part that no other case's name has.
        request: What it is measured with: dtype, backend and size. Its suites, peers and words do not count.

    Raises:
        ValueError: no case has that name, or several do.
    """
    case, twin = _find(case_name, request)
    try:
        contest = Contest(case, request)
        contest.play()
        rows = {row.candidate: row for row in contest.rows({})}
        if rows["ours"].median_ms is None:
            return f"{case.name}: ours {rows['ours'].status}, {rows['ours'].note}"
        page = _Page(contest, rows["ours"], rows["eager"])
    finally:
        case.close()  # before the twin starts: both may be ranks of this process
    return page.text(twin)


class ProductFlops(TorchDispatchMode):
    """Counts FLOPs of products: those of our ops, and what torch's own counter knows, which takes no autograd.grad."""

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


class _Page:
    """What is measured beside the times of the contest, and the text."""

    def __init__(self, contest: Contest, ours: Row, eager: Row) -> None:
        self.case, self.ours, self.eager = contest.case, ours, eager
        self.entry, self.turns = contest.ours, itertools.cycle(contest.ours.inputs)
        self.rounds = max(5, min(30, int(1e3 / ours.median_ms)))
        self.events = self._profile()
        self.beyond = [*self._page_faults(), self._conversions(), *self._recompute()]
        self.passes = self._passes()

    def text(self, twin: Case) -> str:
        case, ours = self.case, self.ours
        floors = [_floor(step, ours) for step in case.steps]
        beyond = [self._launches(twin), *self.beyond]
        rest = ours.median_ms - sum(ms for _, ms, _ in floors) - sum(ms for _, ms, _ in beyond)
        left = "negative where parts overlap" if rest < 0 else "what is left"
        fraction = "" if ours.fraction_of_floor is None else f", {ours.fraction_of_floor:.0%} of the floor"
        eager = f"eager {self.eager.median_ms:.4g} ms" if self.eager.median_ms else f"eager {self.eager.status}"
        parts = {
            "floor": floors or [("nothing counted", 0.0, "")],
            "beyond the floor": [*beyond, ("below the ceilings", rest, left)],
            "by pass": self.passes,
            f"by operator, own time in a profile of {PROFILED} calls": self._operators(),
        }
        head = (
            f"{case.name} on {machine.HERE.name()}, {ours.run}\n"
            f"ours ({ours.backend}) {ours.median_ms:.4g} ms, {ours.q20_ms:.4g} to {ours.q80_ms:.4g} from 20 to 80 % of "
            f"{ours.rounds} rounds{fraction}; {eager}\n"
            f"counted: {ours.formula or 'nothing'}; {ours.bytes / 1e6:.4g} MB and {ours.flops / 1e9:.4g} GFLOP"
        )
        return "\n\n".join([head, *(self._section(title, lines) for title, lines in parts.items() if lines)])

    def _section(self, title: str, lines: Sequence[Line]) -> str:
        width, percent = max(24, *(len(what) for what, _, _ in lines)), 100 / self.ours.median_ms
        texts = (f"  {what:<{width}}{ms:>11.4f} ms{percent * ms:>7.1f} %  {note}".rstrip() for what, ms, note in lines)
        return "\n".join([title, *texts])

    def _step(self) -> tuple[torch.Tensor, ...]:
        return self.case.run(self.entry.call, next(self.turns), self.entry.upstream)

    def _profile(self) -> EventList:
        """Events by name."""
        gpu = machine.HERE.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
        with profile(activities=activities) as profiler:
            for _ in range(PROFILED):
                self._step()
            if gpu:
                torch.cuda.synchronize()
        return profiler.key_averages()

    def _launches(self, twin: Case) -> Line:
        tiny = _least_milliseconds(twin)
        of_tiny = f"a call of shape {'x'.join(map(str, twin.shape))} at best"
        if machine.HERE.device.type == "cpu":
            return "launches", tiny, of_tiny
        kernels = [e for e in self.events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        count = sum(kernel.count for kernel in kernels) / PROFILED
        busy = sum(kernel.self_device_time_total for kernel in kernels) / 1e3 / PROFILED
        note = f"{count:g} kernels and copies take {busy:.4g} ms; the host needs {tiny:.4g} ms for {of_tiny}"
        return "launches", max(0.0, self.ours.median_ms - busy), note

    def _page_faults(self) -> list[Line]:
        if machine.HERE.device.type != "cpu":
            return []

        def count() -> int:
            before = _faults()
            self._step()
            return _faults() - before

        faults, cost = statistics.median(count() for _ in range(self.rounds)), _milliseconds_a_fault()
        return [("page faults", faults * cost, f"{faults:,.0f} of {1e3 * cost:.3g} us")]

    def _conversions(self) -> Line:
        copies = [event for event in self.events if event.key in COPIES]
        calls = sum(event.count for event in copies if event.key == "aten::copy_") / PROFILED
        return "conversions", sum(map(_own_ms, copies)), f"{calls:g} copies"

    def _recompute(self) -> list[Line]:
        if not self.case.steps or not self.ours.flops:
            return []
        with ProductFlops() as done:
            self._step()
        note = f"{done.flops / 1e9:.4g} GFLOP done, {done.flops / self.ours.flops:.3g} of the least"
        return [("recompute", max(0, done.flops - self.ours.flops) / self.ours.gemm_gflops / 1e6, note)]

    def _passes(self) -> list[Line]:
        if self.case.mode == "fwd":
            return []
        seconds = partial(machine.HERE.seconds, head_start=self.entry.head_start)
        forward = self._median(lambda: seconds(lambda: self.entry.call(*next(self.turns))))
        whole = self._median(lambda: seconds(self._step))
        return [("forward", forward, "with a graph"), ("backward", whole - forward, "the rest of a call")]

    def _operators(self) -> list[Line]:
        operators: dict[str, tuple[float, float]] = {}
        for event in self.events:
            if event.device_type == DeviceType.CPU:
                # Autograd's node around an op and the op itself are one and the same call.
                name = _NODE.sub(r"lfcc::\1 \2", event.key).strip()
                ms, calls = operators.get(name, (0.0, 0.0))
                operators[name] = ms + _own_ms(event), max(calls, event.count / PROFILED)
        lines = [(name, ms, f"{calls:g} calls") for name, (ms, calls) in operators.items()]
        return sorted((line for line in lines if line[1] > 1e-3 * self.ours.median_ms), key=lambda line: -line[1])[:TOP]

    def _median(self, seconds: Callable[[], float]) -> float:
        """Of the rounds, in ms."""
        return 1e3 * statistics.median(seconds() for _ in range(self.rounds))


def _find(name: str, request: Request) -> tuple[Case, Case]:
    """The case with ours and eager alone, and what stands in its place among the tiny ones."""
    request = replace(request, suites=list(SUITES))
    cases, twins = variants(request), variants(replace(request, size="tiny"))
    pairs = {case.name: (case, twin) for case, twin in zip(cases, twins, strict=True)}
    found = [name] if name in pairs else [known for known in pairs if name in known]
    if len(found) > 1:
        raise ValueError(f"bench --explain {name!r}: several cases have that in their names: {', '.join(found[:10])}")
    if not found:
        close = ", ".join(difflib.get_close_matches(name, pairs, n=5, cutoff=0))
        raise ValueError(f"bench --explain {name!r}: no case has that in its name; the closest are {close}")
    case, twin = pairs[found[0]]
    return replace(case, candidates={key: case.candidates[key] for key in ("ours", "eager")}), twin


def _floor(step: Step, row: Row) -> Line:
    moving, computing = step.bytes / row.copy_gbps / 1e6, step.flops / row.gemm_gflops / 1e6
    if moving > computing:
        return "bytes", moving, f"{step.bytes / 1e6:.4g} MB at {row.copy_gbps:.4g} GB/s"
    return "products", computing, f"{step.flops / 1e9:.4g} GFLOP at {row.gemm_gflops:.4g} GFLOP/s"


def _own_ms(event: FunctionEventAvg) -> float:
    """Own time of an operator in one call: on a GPU that of the kernels it launched itself."""
    gpu = machine.HERE.device.type == "cuda"
    return (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3 / PROFILED


def _least_milliseconds(case: Case) -> float:
    """Of a call of ours, by the host's clock."""
    try:
        call, inputs = case.candidates["ours"], case.inputs()
        upstream = torch.ones_like(call(*inputs)).detach()
        step = partial(case.run, call, inputs, upstream)
        calls = 1 if machine.HERE.device.type == "cpu" else 20  # several are timed by the host's clock on any device
        return 1e3 * min(machine.HERE.seconds(step, calls) for _ in range(30))
    finally:
        case.close()


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _milliseconds_a_fault() -> float:
    """What writing fresh memory takes longer than writing it again, with torch's threads, over the faults counted."""
    costs = []
    for _ in range(3):
        fresh = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory, before = torch.frombuffer(fresh, dtype=torch.uint8), _faults()
        first = machine.HERE.seconds(partial(memory.fill_, 1))
        faults = _faults() - before
        costs.append(1e3 * (first - machine.HERE.seconds(partial(memory.fill_, 2))) / max(1, faults))
    return max(0.0, min(costs))
