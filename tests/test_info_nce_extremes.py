"""`info_nce` on extreme inputs: equal, zero, huge and non-finite rows, and a batch of one."""

import math
from collections.abc import Callable

import pytest
import torch
from grids import grid
from oracles import accumulator, gradients, in_float64, rounding, torch_info_nce
from torch import Tensor, randn

import lfcc_kernels as lk

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DIRECTIONS = ["student_to_teacher", "teacher_to_student", "symmetric"]


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


# Norms are taken of each row by itself, before the direction matters: so a length meets each side and each direction.
@grid(
    length={f"{length}, {dtype}": (make, dtype) for length, (make, dtypes) in LENGTHS.items() for dtype in dtypes},
    side=["student", "teacher", "both"],
    direction=DIRECTIONS,
    named=[
        ("a zero row, torch.float32", "both", "symmetric"),
        ("squares beyond float16, torch.float16", "both", "symmetric"),
    ],
)
def test_rows_of_extreme_length(
    kernels: str, length: tuple[Callable[[torch.dtype], Tensor], torch.dtype], side: str, direction: str
) -> None:
    """Close to the truth; a gradient is measured against its row's length, of which it is the inverse."""
    make, dtype = length
    sides = [make(dtype) if side in (name, "both") else randn(70, 33).to(dtype) for name in ("student", "teacher")]
    inputs = [side.requires_grad_() for side in sides]
    exact_inputs = in_float64(*inputs)
    loss, truth = lk.info_nce(*inputs, direction=direction), torch_info_nce(*exact_inputs, direction=direction)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    for rows, result, exact in zip(exact_inputs, gradients(loss, inputs), gradients(truth, exact_inputs), strict=True):
        lengths = rows.detach().norm(dim=1, keepdim=True).clamp_min(1e-12)
        result, exact, numbers = result.double() * lengths, exact * lengths, torch.finfo(dtype)
        bound = 4 * numbers.eps * exact.abs() + numbers.eps * numbers.smallest_normal * lengths + 2e-6
        if kernels != "cpu":  # weights are of the rows' dtype, so the gradient of a row is rounded as a whole
            bound += numbers.eps * exact.abs().amax(1, keepdim=True)
        assert ((result - exact).abs() <= bound).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("ids", [None, torch.arange(4)], ids=["no ids", "ids"])
def test_a_zero_row_in_float16_leaves_the_loss_finite(backend: str, direction: str, ids: Tensor | None) -> None:
    """Its gradient is 1e12 times a number of order one, beyond float16; that of all other rows is finite."""
    student, teacher = (randn(4, 33).half() for _ in range(2))
    student[2] = 0
    student.requires_grad_()
    loss = lk.info_nce(student, teacher, direction=direction, student_ids=ids, teacher_ids=ids)
    loss.backward()
    assert loss.isfinite() and student.grad[[0, 1, 3]].isfinite().all()


# Rows decide between fused tiles and chunks, and how many tiles there are; all logits are equal in each of them.
@grid(rows=[2, 70, 200], dtype=DTYPES, direction=DIRECTIONS, named=[(200, torch.bfloat16, "symmetric")])
def test_identical_rows_give_log_of_the_batch(kernels: str, rows: int, dtype: torch.dtype, direction: str) -> None:
    row = randn(1, 33).to(dtype)
    student, teacher = (row.repeat(rows, 1).requires_grad_() for _ in range(2))
    loss = lk.info_nce(student, teacher, direction=direction, temperature=0.005)
    assert loss.item() == pytest.approx(math.log(rows), abs=4 * rounding(accumulator(dtype), 200.0))
    for grad in gradients(loss, [student, teacher]):
        assert grad.abs().max() < 1e-4  # against 1 / temperature = 200


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pair_has_loss_zero_and_no_gradient(backend: str, dtype: torch.dtype, direction: str) -> None:
    student, teacher = (randn(1, 33).to(dtype).requires_grad_() for _ in range(2))
    temperature = torch.tensor(0.1, requires_grad=True)
    loss = lk.info_nce(student, teacher, temperature=temperature, direction=direction)
    assert loss == 0
    for grad in gradients(loss, [student, teacher, temperature]):
        assert not grad.any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_separated_pairs_have_loss_zero(backend: str, direction: str) -> None:
    """At a temperature of 0.005 the exponentials of the others vanish against that of the positive."""
    rows = torch.eye(40, requires_grad=True)
    loss = lk.info_nce(rows, torch.eye(40), temperature=0.005, direction=direction)
    (grad,) = torch.autograd.grad(loss, rows)
    assert 0 <= loss < 1e-6 and grad.abs().max() < 1e-5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_opposed_pairs_have_the_loss_of_the_formula(backend: str, direction: str) -> None:
    """Logits of -200 and 0: if the maximum were not subtracted, the exponentials would underflow and overflow."""
    loss = lk.info_nce(torch.eye(40), -torch.eye(40), temperature=0.005, direction=direction)
    assert loss.item() == pytest.approx(200 + math.log(39), rel=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logits_past_the_range_of_exp(kernels: str, direction: str) -> None:
    """Rows that are not normalized, with logits of about 1e6; float64 keeps the digits of their differences."""
    student, teacher = ((1e3 * randn(70, 33, dtype=torch.float64)).requires_grad_() for _ in range(2))
    loss = lk.info_nce(student, teacher, normalize=False, direction=direction)
    truth = torch_info_nce(student, teacher, normalize=False, direction=direction)
    torch.testing.assert_close(loss, truth)
    expected = gradients(truth, [student, teacher])
    for result, exact in zip(gradients(loss, [student, teacher]), expected, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


# A broken number reaches the loss through a row's norm or through a product, in tiles or chunks of either form; which
# number it is matters to comparisons with the running maximum alone.
@grid(
    rows=[5, 70, 300],
    side=["student", "teacher"],
    bad=[torch.nan, torch.inf, -torch.inf],
    learns=[True, False],
    normalize=[True, False],
    direction=DIRECTIONS,
    named=[
        (300, "teacher", -torch.inf, True, False, "student_to_teacher"),
        (70, "student", torch.nan, True, True, "symmetric"),
    ],
)
def test_nan_and_inf_come_out(
    backend: str, rows: int, side: str, bad: float, learns: bool, normalize: bool, direction: str
) -> None:
    student, teacher = randn(rows, 33), randn(rows, 33)
    {"student": student, "teacher": teacher}[side][rows - 2, 7] = bad
    loss = lk.info_nce(student.requires_grad_(learns), teacher, direction=direction, normalize=normalize)
    assert not loss.isfinite()


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("rows", [5, 70])
def test_nan_in_a_key_reaches_the_loss_of_every_row(backend: str, rows: int, learns: bool) -> None:
    """The mean is NaN by the key's own row alone."""
    student, teacher = randn(rows, 33, requires_grad=learns), randn(rows, 33)
    teacher[rows - 2, 7] = torch.nan
    assert lk.info_nce(student, teacher, reduction="none").isnan().all()


# Weights of float16 are divided by the largest upstream gradient, in fused tiles and in chunks.
@grid(
    size=[0.0, 1e-36],
    dtype=[torch.float16, torch.bfloat16],
    width=[33, 133],
    direction=DIRECTIONS,
    named=[(1e-36, torch.float16, width, direction) for width in (33, 133) for direction in DIRECTIONS],
)
def test_an_upstream_gradient_of_next_to_nothing(
    kernels: str, size: float, dtype: torch.dtype, width: int, direction: str
) -> None:
    """As a loss weight of zero gives: gradients of next to nothing, and not NaN."""
    student, teacher = (randn(70, width).to(dtype).requires_grad_() for _ in range(2))
    loss = lk.info_nce(student, teacher, direction=direction)
    for grad in gradients(loss, [student, teacher], torch.full_like(loss, size)):
        assert grad.isfinite().all() and grad.abs().max() <= size * 1e3
