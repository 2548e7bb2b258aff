"""What training runs into sooner or later: equal, empty, huge and broken rows, and a batch of one."""

import math
from collections.abc import Callable

import pytest
import torch
from oracles import accumulator, gradients, in_float64, loop_info_nce, rounding
from torch import Tensor, randn

import lfcc_kernels as lk

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DIRECTIONS = ["student_to_teacher", "teacher_to_student", "symmetric"]

pytestmark = pytest.mark.parametrize("direction", DIRECTIONS)


def scaled_rows(scales: dict[int, float]) -> Callable[[torch.dtype], Tensor]:
    def make(dtype: torch.dtype) -> Tensor:
        rows = randn(70, 33, dtype=torch.float64)
        for row, scale in scales.items():
            rows[row] *= scale
        return rows.to(dtype)

    return make


LENGTHS = {
    "a zero row": (scaled_rows({3: 0.0}), [torch.float64, torch.float32, torch.bfloat16]),
    "squares beyond float32": (scaled_rows({3: 1e30}), [torch.float64, torch.float32, torch.bfloat16]),
    "squares just inside float32": (scaled_rows({3: 1e18}), [torch.float32, torch.bfloat16]),
    "squares beyond float16": (scaled_rows({3: 1e4}), [torch.float16]),
    "a row below the least norm": (scaled_rows({3: 1e-20}), [torch.float64, torch.float32, torch.bfloat16]),
    "a row just above the least norm": (scaled_rows({3: 1e-11}), [torch.float64, torch.float32]),
    "rows of every length": (
        scaled_rows({row: 10.0 ** (row - 9) for row in range(0, 19, 2)}),
        [torch.float64, torch.float32, torch.bfloat16],
    ),
    "all rows huge": (scaled_rows(dict.fromkeys(range(70), 1e25)), [torch.float32, torch.bfloat16]),
    "all rows tiny": (scaled_rows(dict.fromkeys(range(70), 1e-9)), [torch.float32, torch.bfloat16]),
}


@pytest.mark.parametrize("extreme_side", ["student", "teacher", "both"])
@pytest.mark.parametrize(
    ("length", "dtype"),
    [(length, dtype) for length, (_, dtypes) in LENGTHS.items() for dtype in dtypes],
    ids=lambda value: str(value),
)
def test_rows_of_extreme_length(
    backend: str, length: str, dtype: torch.dtype, extreme_side: str, direction: str
) -> None:
    """Close to the truth; a gradient is measured against its row's length, of which it is the inverse."""
    sides = [
        LENGTHS[length][0](dtype) if extreme_side in (name, "both") else randn(70, 33).to(dtype)
        for name in ("student", "teacher")
    ]
    inputs = [side.requires_grad_() for side in sides]
    exact_inputs = in_float64(*inputs)
    loss, truth = lk.info_nce(*inputs, direction=direction), loop_info_nce(*exact_inputs, direction=direction)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    for rows, result, exact in zip(exact_inputs, gradients(loss, inputs), gradients(truth, exact_inputs), strict=True):
        lengths = rows.detach().norm(dim=1, keepdim=True).clamp_min(1e-12)
        result, exact, numbers = result.double() * lengths, exact * lengths, torch.finfo(dtype)
        bound = 4 * numbers.eps * exact.abs() + numbers.eps * numbers.smallest_normal * lengths + 2e-6
        if backend in (
            "triton",
            "cuda",
        ):  # their weights are of the rows' type, so a row's gradient is rounded as a whole
            bound += numbers.eps * exact.abs().amax(1, keepdim=True)
        assert ((result - exact).abs() <= bound).all()


@pytest.mark.parametrize("ids", [None, torch.arange(4)], ids=["no ids", "ids"])
def test_a_zero_row_in_float16_leaves_the_loss_finite(backend: str, direction: str, ids: Tensor | None) -> None:
    """Its gradient is 1e12 times a number of order one, beyond float16; that of all other rows is finite."""
    student, teacher = (randn(4, 33).half() for _ in range(2))
    student[2] = 0
    student.requires_grad_()
    loss = lk.info_nce(student, teacher, direction=direction, student_ids=ids, teacher_ids=ids)
    loss.backward()
    assert loss.isfinite() and student.grad[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 70, 300])
def test_identical_rows_give_log_of_the_batch(backend: str, rows: int, dtype: torch.dtype, direction: str) -> None:
    row = randn(1, 33).to(dtype)
    student, teacher = (row.repeat(rows, 1).requires_grad_() for _ in range(2))
    loss = lk.info_nce(student, teacher, direction=direction, temperature=0.005)
    assert loss.item() == pytest.approx(math.log(rows), abs=4 * rounding(accumulator(dtype), 200.0))
    for grad in gradients(loss, [student, teacher]):
        assert grad.abs().max() < 1e-4  # against 1 / temperature = 200


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pair_costs_nothing_and_teaches_nothing(backend: str, dtype: torch.dtype, direction: str) -> None:
    student, teacher = (randn(1, 33).to(dtype).requires_grad_() for _ in range(2))
    temperature = torch.tensor(0.1, requires_grad=True)
    loss = lk.info_nce(student, teacher, temperature=temperature, direction=direction)
    assert loss == 0
    for grad in gradients(loss, [student, teacher, temperature]):
        assert not grad.any()


def test_separated_pairs_cost_nothing(backend: str, direction: str) -> None:
    """At a temperature of 0.005 the others' exponentials vanish against the positive's."""
    rows = torch.eye(40, requires_grad=True)
    loss = lk.info_nce(rows, torch.eye(40), temperature=0.005, direction=direction)
    (grad,) = torch.autograd.grad(loss, rows)
    assert 0 <= loss < 1e-6 and grad.abs().max() < 1e-5


def test_opposed_pairs_cost_what_the_formula_says(backend: str, direction: str) -> None:
    """Logits of -200 and 0: without the maximum taken off, the exponentials would under- and overflow."""
    loss = lk.info_nce(torch.eye(40), -torch.eye(40), temperature=0.005, direction=direction)
    assert loss.item() == pytest.approx(200 + math.log(39), rel=1e-6)


def test_logits_past_the_range_of_exp(backend: str, direction: str) -> None:
    """Rows as they are, with logits of about 1e6; in float64, where the differences keep their digits."""
    student, teacher = ((1e3 * randn(70, 33, dtype=torch.float64)).requires_grad_() for _ in range(2))
    loss = lk.info_nce(student, teacher, normalize=False, direction=direction)
    truth = loop_info_nce(student, teacher, normalize=False, direction=direction)
    torch.testing.assert_close(loss, truth)
    expected = gradients(truth, [student, teacher])
    for result, exact in zip(gradients(loss, [student, teacher]), expected, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "rows as they are"])
@pytest.mark.parametrize("learns", [True, False], ids=["learns", "no gradient"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("rows", [5, 70, 300])
def test_nan_and_inf_come_out(
    backend: str, rows: int, side: str, bad: float, learns: bool, normalize: bool, direction: str
) -> None:
    student, teacher = randn(rows, 33), randn(rows, 33)
    {"student": student, "teacher": teacher}[side][rows - 2, 7] = bad
    loss = lk.info_nce(student.requires_grad_(learns), teacher, direction=direction, normalize=normalize)
    assert not loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-36])
def test_an_upstream_gradient_of_next_to_nothing(backend: str, size: float, dtype: torch.dtype, direction: str) -> None:
    """As a loss weight of zero gives: gradients of next to nothing, and no NaN."""
    student, teacher = (randn(70, 33).to(dtype).requires_grad_() for _ in range(2))
    loss = lk.info_nce(student, teacher, direction=direction)
    for grad in gradients(loss, [student, teacher], torch.full_like(loss, size)):
        assert grad.isfinite().all() and grad.abs().max() <= size * 1e3
