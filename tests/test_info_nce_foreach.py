"""`info_nce_foreach` against the reference pair by pair. Other backends than Triton loop over `info_nce`."""

from typing import Any

import pytest
import torch
from oracles import accumulator, assert_close_to_truth, gradients, in_float64, rounding, torch_info_nce
from test_compile import assert_same
from torch import Tensor, randn

import lfcc_kernels as lk
from lfcc_kernels.functional import info_nce_foreach

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDTHS = (3, 16, 33, 300)
ROWS = {"batched": 20, "sequential": 200}


def pairs(batch: int, keys: int, dtype: torch.dtype, widths: tuple[int, ...] = WIDTHS) -> tuple[list[Tensor], ...]:
    """Trainable students and frozen teachers; every second one is a slice of wider rows."""
    sides = []
    for rows in (batch, keys):
        wide = [randn(rows, 2 * width).to(dtype) for width in widths]
        sides.append([x[:, : x.shape[1] // 2] if n % 2 else x[:, ::2] for n, x in enumerate(wide)])
    return [student.requires_grad_() for student in sides[0]], sides[1]


def check(students: list[Tensor], teachers: list[Tensor], temperature: float = 0.5, **options: Any) -> None:
    learning = torch.tensor(temperature, dtype=accumulator(students[0].dtype), requires_grad=True)
    losses = info_nce_foreach(students, teachers, temperature=learning, **options)
    upstream = torch.randn_like(losses)
    results = gradients(losses, [*students, learning], upstream)
    exact_students, (exact_temperature,) = in_float64(*students), in_float64(learning)
    references = torch.stack(
        [torch_info_nce(*pair, temperature=learning, **options) for pair in zip(students, teachers, strict=True)]
    )
    pairs = zip(exact_students, teachers, strict=True)
    truths = torch.stack([torch_info_nce(*pair, temperature=exact_temperature, **options) for pair in pairs])
    precision = rounding(accumulator(students[0].dtype), 1 / temperature)
    assert_close_to_truth(losses, references, truths, factor=2, floor=4 * precision)
    expected = (
        gradients(references, [*students, learning], upstream),
        gradients(truths, [*exact_students, exact_temperature], upstream.double()),
    )
    for result, reference, exact in zip(results, *expected, strict=True):
        floor = 4 * rounding(result.dtype, exact) + 4 * precision / temperature
        assert_close_to_truth(result, reference, exact, factor=3, floor=floor if result.dim() == 0 else floor / 10)


triton = pytest.mark.parametrize("kernels", ["triton"], indirect=True)


def test_every_backend(backend: str) -> None:
    check(*pairs(20, 20, torch.float32))


@triton
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradients(kernels: str, dtype: torch.dtype, rows: str) -> None:
    check(*pairs(ROWS[rows], ROWS[rows], dtype))


@triton
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student", "symmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ids_and_more_keys_than_rows(kernels: str, dtype: torch.dtype, direction: str) -> None:
    """One direction is a single call; the others loop."""
    teacher_ids = torch.randint(5, (50,))
    ids = {"student_ids": teacher_ids[13:33], "teacher_ids": teacher_ids}
    check(*pairs(20, 50, dtype), positive_offset=13, direction=direction, **ids)


@triton
def test_trainable_teacher(kernels: str) -> None:
    students, teachers = pairs(20, 20, torch.float64)
    teachers[1].requires_grad_()
    losses = info_nce_foreach(students, teachers)
    (grad,) = torch.autograd.grad(losses.sum(), [teachers[1]])
    (expected,) = torch.autograd.grad(torch_info_nce(students[1], teachers[1]), [teachers[1]])
    torch.testing.assert_close(grad, expected)


@triton
def test_frozen_and_trainable_students(kernels: str) -> None:
    students, teachers = pairs(20, 20, torch.float32)
    students[2] = students[2].detach()
    losses = info_nce_foreach(students, teachers)
    losses.sum().backward()
    for student in (students[0], students[1], students[3]):
        assert student.is_leaf and student.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(info_nce_foreach(students, teachers), losses.detach())


@triton
def test_pairs_of_different_batches(kernels: str) -> None:
    (students, teachers), (more_students, more_teachers) = (pairs(rows, rows, torch.float32, (8,)) for rows in (5, 9))
    students, teachers = students + more_students, teachers + more_teachers
    losses = info_nce_foreach(students, teachers)
    expected = [torch_info_nce(*pair).float() for pair in zip(students, teachers, strict=True)]
    torch.testing.assert_close(losses, torch.stack(expected))


@triton
def test_second_derivative_names_the_backend_that_has_one(kernels: str) -> None:
    students, teachers = pairs(8, 8, torch.float32)
    (grad,) = torch.autograd.grad(info_nce_foreach(students, teachers).sum(), students[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"use_backend\('eager'\)"):
        grad.square().sum().backward()


@triton
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_row_breaks_its_own_loss_alone(kernels: str, bad: float) -> None:
    students, teachers = pairs(20, 20, torch.float32)
    with torch.no_grad():
        students[1][7, 2] = bad
    losses = info_nce_foreach(students, teachers)
    assert losses.isfinite().tolist() == [True, False, True, True]


@triton
def test_compiled(kernels: str) -> None:
    students, teachers = pairs(8, 8, torch.float32, (4, 20))

    def function(*students: Tensor) -> Tensor:
        return info_nce_foreach(students, teachers)

    torch._dynamo.reset()
    assert_same(torch.compile(function, fullgraph=True, backend="aot_eager"), function, students)


def test_a_loss_of_many_pairs_needs_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve pairs, stages by scales, need as many launches as one pair."""
    if "triton" not in lk.available_backends():
        pytest.skip("Triton is not available")
    from lfcc_kernels.backends.triton import info_nce_chunks, info_nce_rows
    from lfcc_kernels.backends.triton import info_nce_foreach as group

    launched = []
    for module in (group, info_nce_chunks, info_nce_rows):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernel = getattr(module, name)
            recorder = type("Recorder", (), {})
            recorder.__getitem__ = lambda self, grid, kernel=kernel: launched.append(kernel) or kernel[grid]
            monkeypatch.setattr(module, name, recorder())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loss = lk.LFCCLoss((4,) * 4, (6,) * 4).to(device)
    maps = [randn(8, channels, 8, 8, device=device) for channels in (4, 6) for _ in range(4)]
    with lk.use_backend("triton"):
        pyramids = loss.student_pyramids(maps[:4]), loss.teacher_pyramids(maps[4:])
        loss.contrast(*pyramids).backward()
    assert len(launched) == 5


def test_lists_of_different_lengths_raise() -> None:
    x = randn(4, 8)
    for students, teachers in ([[], []], [[x], [x, x]]):
        with pytest.raises(ValueError, match="expected two lists of one length"):
            info_nce_foreach(students, teachers)
