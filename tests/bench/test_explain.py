"""`lfcc bench --explain`: the parts of a case's time are counted correctly and add up."""

import math
import mmap
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rows import row
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType

import lfcc_kernels as lk
from lfcc_kernels.bench import explain as module
from lfcc_kernels.bench.cases import Case, Step, variants
from lfcc_kernels.bench.explain import ProductFlops, _Breakdown, explain
from lfcc_kernels.bench.machine import Cpu, Machine
from lfcc_kernels.bench.record import Request

TINY = Request([], "cpu", "tiny")


@pytest.fixture(autouse=True)
def three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "rounds", lambda self, seconds: 3)


def sections(page: str) -> dict[str, dict[str, tuple[float, float, str]]]:
    """Milliseconds, percent and note of every line, by section."""
    line = re.compile(r"  (.+?) +(-?[\d.]+) ms +(-?[\d.]+) % *(.*)")
    head, *parts = page.split("\n\n")
    return {"": head} | {
        part.splitlines()[0]: {
            m[1]: (float(m[2]), float(m[3]), m[4]) for m in map(line.fullmatch, part.splitlines()[1:])
        }
        for part in parts
    }


@pytest.mark.parametrize("name", ["lowpass-nchw", "info_nce-one-way", "lfcc-average"])
def test_parts_add_up_to_the_time(name: str) -> None:
    cases = [
        case for case in variants(replace(TINY, suites=[name.split("-")[0]]), Cpu("tiny")) if case.mode == "fwd+bwd"
    ]
    case = next(case for case in cases if case.name.startswith(name) and case.dtype == torch.float32)
    page = sections(explain(case.name, TINY))
    floor, beyond, passes = page["floor"], page["beyond the floor"], page["by pass"]
    assert page[""].startswith(case.name) and len(floor) == len(case.steps)
    median = float(re.search(r"^lfcc \(\w+\) ([\d.e-]+) ms", page[""], re.MULTILINE)[1])
    assert sum(ms for ms, _, _ in (*floor.values(), *beyond.values())) == pytest.approx(median, abs=2e-3, rel=1e-3)
    assert sum(share for _, share, _ in (*floor.values(), *beyond.values())) == pytest.approx(100, abs=0.5)
    assert set(passes) == {"forward", "backward"}
    operators = next(lines for title, lines in page.items() if title.startswith("by operator"))
    assert any(what.startswith("lfcc::") for what in operators)
    if case.steps[-1].flops:
        done, least = re.fullmatch(
            r"([\d.e+-]+) GFLOP computed, ([\d.e+-]+) of the least", beyond["recompute"][2]
        ).groups()
        flops = sum(step.flops for step in case.steps)
        assert float(done) == pytest.approx(float(least) * flops / 1e9, rel=2e-3)
        assert float(least) >= 1


def test_requested_backend() -> None:
    name = next(
        case.name for case in variants(replace(TINY, suites=["info_nce"]), Cpu("tiny")) if "symmetric" in case.name
    )
    page = sections(explain(name, replace(TINY, backend="eager")))
    assert "lfcc (eager)" in page[""]
    assert not any("lfcc::" in what for lines in page.values() if isinstance(lines, dict) for what in lines)


def test_ambiguous_and_unknown_names() -> None:
    names = [case.name for case in variants(replace(TINY, suites=["lowpass"]), Cpu("tiny"))]
    with pytest.raises(ValueError, match=r"several case names contain 'lowpass': .*lowpass"):
        explain("lowpass", TINY)
    misspelt = names[0].replace("lowpass", "lopwass")
    with pytest.raises(
        ValueError, match=rf"no case name contains '{re.escape(misspelt)}'; the closest are.*{re.escape(names[0])}"
    ):
        explain(misspelt, TINY)


def test_failure_of_lfcc_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of chalk")

    case = variants(replace(TINY, suites=["overhead"]), Cpu("tiny"))[0]
    case = replace(case, candidates=case.candidates | {"lfcc": broken})
    monkeypatch.setattr(module, "_find", lambda name, request, machine: (case, case))
    assert explain(case.name, TINY) == f"{case.name}: lfcc failed, RuntimeError: out of chalk"


def test_the_floor_is_the_longer_of_moving_and_computing() -> None:
    measured = row("lowpass-nchw-2x8x4x4-float32-fwd", "lfcc", copy_gbps=10.0, gemm_gflops=100.0)
    assert module._floor(Step(bytes=20_000_000, flops=100_000_000), measured)[:2] == ("bytes", pytest.approx(2.0))
    assert module._floor(Step(bytes=20_000_000, flops=300_000_000), measured)[:2] == ("products", pytest.approx(3.0))


ROWS, KEYS, DIM = 6, 9, 5


@pytest.mark.parametrize(
    ("student_learns", "teacher_learns", "direction", "keys", "products"),
    [
        (False, False, "student_to_teacher", KEYS, 1),
        (True, False, "student_to_teacher", KEYS, 2),
        (True, True, "student_to_teacher", KEYS, 4),
        (False, False, "symmetric", ROWS, 1),
        (True, False, "symmetric", ROWS, 3),
        (True, True, "symmetric", ROWS, 5),
    ],
)
def test_flops_of_the_contrast(
    compiled_kernels: str, student_learns: bool, teacher_learns: bool, direction: str, keys: int, products: int
) -> None:
    """In products of all pairs of rows: one for the logits, and those of ops/info_nce.py for the gradients."""
    student, teacher = torch.randn(ROWS, DIM, requires_grad=student_learns), torch.randn(keys, DIM)
    teacher.requires_grad_(teacher_learns)
    with ProductFlops() as counter:
        loss = lk.info_nce(student, teacher, direction=direction)
        if loss.requires_grad:
            loss.backward()
    assert counter.flops == products * 2 * ROWS * keys * DIM


def test_flops_of_foreach() -> None:
    """With fake tensors, which do not need Triton."""
    with FakeTensorMode(), ProductFlops() as counter:
        students, teachers = ([torch.randn(rows, dim) for dim in (5, 3)] for rows in (6, 9))
        torch.ops.lfcc.info_nce_foreach.triton(students, teachers, torch.tensor(0.1), None, None, 0, True)
    assert counter.flops == 4 * 6 * 9 * (5 + 3)


def test_flops_of_torch() -> None:
    """A product and its two gradients."""
    a, b = torch.randn(4, 5, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    with ProductFlops() as counter:
        torch.autograd.grad((a @ b).sum(), (a, b))
    assert counter.flops == 3 * 2 * 4 * 5 * 6


def test_page_faults_are_counted() -> None:
    pages = 512
    with mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        before = module._faults()
        for n in range(pages):
            memory[n * mmap.PAGESIZE] = 1
        assert pages <= module._faults() - before < 2 * pages


def test_launches_on_a_gpu_are_the_time_without_a_kernel() -> None:
    """Two kernels of 30 and 50 us per call in 0.1 ms; an annotation is not a kernel."""

    def event(microseconds: float, device: DeviceType = DeviceType.CUDA, annotation: bool = False) -> SimpleNamespace:
        calls = module.PROFILED
        return SimpleNamespace(
            count=calls, self_device_time_total=calls * microseconds, device_type=device, is_user_annotation=annotation
        )

    candidates = {"lfcc": lambda x: 2 * x}
    page = object.__new__(_Breakdown)
    twin = Case("lowpass", "made-up", (3,), "fwd", lambda: (torch.ones(3),), candidates)
    page.lfcc = SimpleNamespace(median_ms=0.1)
    page.events = [event(30), event(50), event(80, DeviceType.CPU), event(80, annotation=True)]
    page.machine = SimpleNamespace(gpu=True, seconds=lambda step, calls: 4e-5)
    what, ms, note = page._launches(twin)
    assert what == "launches" and math.isclose(ms, 0.02, rel_tol=1e-6)
    assert note.startswith("2 kernels and copies take 0.08 ms; the host needs 0.04 ms")
    assert page._page_faults() == []
