"""`info_nce` and its gradients against loops in float64, for every direction and what may trip a kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import (
    accumulator,
    assert_close_to_truth,
    gradients,
    in_float64,
    loop_info_nce,
    rounding,
    torch_info_nce,
)
from torch import Tensor, randn

import lfcc_kernels as lk

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DIRECTIONS = ["student_to_teacher", "teacher_to_student", "symmetric"]

# B, K, positive_offset, D
SIZES = {
    "one pair": (1, 1, 0, 3),
    "one row, three keys": (1, 3, 2, 32),
    "one value a row": (2, 2, 0, 1),
    "three": (3, 3, 0, 3),
    "seven": (7, 7, 0, 32),
    "a power of two": (64, 64, 0, 128),
    "one over it": (65, 65, 0, 128),
    "prime": (127, 127, 0, 130),
    "wide, odd": (130, 130, 0, 515),
    "one over a block of rows": (257, 257, 0, 32),
    "one over a tile of keys": (9, 1025, 1016, 5),
    "more keys than a block of threads keeps": (5, 8199, 8190, 3),
    "several tiles of keys, wide rows": (20, 300, 250, 4099),
    "keys of three ranks, the middle one's": (64, 192, 64, 32),
    "positives at the end of the keys": (65, 300, 235, 33),
    "a queue longer than a tile": (7, 1100, 600, 32),
}


def check(student: Tensor, teacher: Tensor, **options: Any) -> None:
    """Compare the loss and the gradient of all that learns with the truth."""
    temperature = options.pop("temperature", 0.1)
    temperature = temperature if isinstance(temperature, Tensor) else torch.tensor(temperature).double()
    inputs = [student, teacher, temperature]
    exact_inputs = in_float64(*inputs)
    loss = lk.info_nce(student, teacher, temperature=temperature, **options)
    reference = torch_info_nce(student, teacher, temperature=temperature, **options)
    truth = loop_info_nce(*exact_inputs[:2], temperature=exact_inputs[2], **options)

    # A logit is at most this large, so nothing is known better than its rounding.
    lengths = [side.detach().double().norm(dim=1) for side in (student, teacher)]
    key_length = 1.0 if options.get("normalize", True) else max(length.max().item() for length in lengths)
    logit = max(1.0, key_length / temperature.item() * (1 if options.get("normalize", True) else key_length))
    precision = rounding(accumulator(student.dtype), logit)
    assert_close_to_truth(loss, reference, truth, factor=2, floor=4 * precision)
    if not loss.requires_grad:
        return

    upstream = torch.randn_like(loss)
    results = gradients(loss, inputs, upstream)
    expected = gradients(reference, inputs, upstream), gradients(truth, exact_inputs, upstream.double())
    for result, torch_gradient, exact in zip(results, *expected, strict=True):
        if result.dim() == 0:
            rows = len(student) if loss.dim() else 1  # the roundings of a sum add up as those of a random walk
            largest = logit / temperature.item() * rows**0.5
        else:
            shortest = min(length.min().item() for length in lengths) if key_length == 1.0 else 1.0
            largest = key_length / shortest / temperature.item() / (1 if loss.dim() else len(student))
        floor = rounding(result.dtype, exact) + precision * largest * upstream.abs().max().item()
        assert_close_to_truth(result, torch_gradient, exact, factor=3, floor=floor)


def pair(batch: int = 65, keys: int = 65, width: int = 33, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Student and teacher rows that resemble each other a little, both learning."""
    common = randn(max(batch, keys), width)
    return [(common[:rows] + 2 * randn(rows, width)).to(dtype).requires_grad_() for rows in (batch, keys)]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(backend: str, size: str, dtype: torch.dtype, direction: str) -> None:
    batch, keys, offset, width = SIZES[size]
    temperature = torch.tensor(0.1, dtype=accumulator(dtype), requires_grad=True)
    check(*pair(batch, keys, width, dtype), temperature=temperature, direction=direction, positive_offset=offset)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("keys", [65, 130])
@pytest.mark.parametrize("learns", ["s", "t", "T", "st", "sT", "tT", "stT", ""])
def test_gradients_for_every_subset(backend: str, learns: str, keys: int, direction: str) -> None:
    student, teacher = (x.detach().requires_grad_(name in learns) for x, name in zip(pair(65, keys), "st", strict=True))
    temperature = torch.tensor(0.1, requires_grad="T" in learns)
    check(student, teacher, temperature=temperature, direction=direction, positive_offset=keys - 65)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.005, 0.1, 1.0, 10.0])
def test_temperatures(backend: str, temperature: float, dtype: torch.dtype, reduction: str, direction: str) -> None:
    """Constant, and learning in the rows' type and in the other one."""
    student, teacher = pair(dtype=dtype)
    check(student, teacher, temperature=temperature, direction=direction, reduction=reduction)
    for own in (torch.float32, torch.float64):
        learning = torch.tensor(temperature, dtype=own, requires_grad=True)
        check(student, teacher, temperature=learning, direction=direction, reduction=reduction)


IDS: dict[str, Callable[[int], Tensor]] = {
    "all different": lambda rows: torch.arange(rows),
    "five classes": lambda rows: torch.arange(rows) % 5,
    "repeats side by side": lambda rows: torch.arange(rows) // 2,
    "mirror partners, as mixup makes": lambda rows: torch.minimum(torch.arange(rows), rows - 1 - torch.arange(rows)),
    "all equal": lambda rows: torch.full((rows,), 7),
    "large and negative": lambda rows: (torch.arange(rows) % 3 - 1) * 2**62,
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [70, 600])
@pytest.mark.parametrize("kind", IDS)
def test_ids(backend: str, kind: str, keys: int, dtype: torch.dtype, direction: str) -> None:
    offset = keys - 66
    teacher_ids = IDS[kind](keys)
    check(
        *pair(65, keys, dtype=dtype), temperature=torch.tensor(0.1, requires_grad=True), direction=direction,
        student_ids=teacher_ids[offset : offset + 65], teacher_ids=teacher_ids, positive_offset=offset,
    )  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ids_that_differ_between_the_sides(backend: str, direction: str) -> None:
    """A positive counts whatever its ids say; only other pairs are left out."""
    student_ids, teacher_ids = torch.randint(4, (65,)), torch.randint(4, (65,))
    check(*pair(), direction=direction, student_ids=student_ids, teacher_ids=teacher_ids)


def test_ids_of_any_integer_type_and_stride(backend: str) -> None:
    student, teacher = pair()
    ids = torch.randint(9, (65,))
    expected = lk.info_nce(student, teacher, student_ids=ids, teacher_ids=ids)
    for same in (ids.int(), ids.to(torch.uint8), torch.stack([ids, ids + 1], 1)[:, 0]):
        assert lk.info_nce(student, teacher, student_ids=same, teacher_ids=same) == expected
    assert expected != lk.info_nce(student, teacher)


ROW_LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "a slice of wider rows": lambda: randn(65, 100)[:, 10:43],
    "every second column": lambda: randn(65, 66)[:, ::2],
    "every second row": lambda: randn(130, 33)[::2],
    "transposed": lambda: randn(33, 65).t(),
    "one row for all": lambda: randn(1, 33).expand(65, -1),
    "one column for all": lambda: randn(65, 1).expand(-1, 33),
    "overlapping rows": lambda: randn(97).unfold(0, 33, 1),
    "flattened cells of a pyramid": lambda: randn(65, 21, 11)[:, 1:4].flatten(1),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", ROW_LAYOUTS)
def test_layouts(backend: str, layout: str, direction: str) -> None:
    make, dense = ROW_LAYOUTS[layout], randn(65, 33, requires_grad=True)
    for sides in ((make().requires_grad_(), dense), (dense, make().requires_grad_())):
        before = [side.detach().clone() for side in sides]
        check(*sides, direction=direction)
        assert all(torch.equal(*both) for both in zip(sides, before, strict=True))


def test_rows_further_apart_than_32_bits_count(backend: str) -> None:
    rows, apart = randn(3, 20).bfloat16(), 2**30 + 8
    memory = torch.empty(2 * apart + 20, dtype=torch.bfloat16)
    student = memory.as_strided((3, 20), (apart, 1)).copy_(rows)
    torch.testing.assert_close(lk.info_nce(student, rows.flip(1)), lk.info_nce(rows, rows.flip(1)))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_as_they_are(backend: str, dtype: torch.dtype, direction: str) -> None:
    temperature = torch.tensor(2.0, requires_grad=True)
    check(*pair(65, 130, dtype=dtype), temperature=temperature, direction=direction, normalize=False)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduction_none_gives_each_row(backend: str, dtype: torch.dtype, direction: str) -> None:
    student, teacher = pair(65, 130, dtype=dtype)
    check(student, teacher, direction=direction, reduction="none")
    rows = lk.info_nce(student, teacher, direction=direction, reduction="none")
    mean = lk.info_nce(student, teacher, direction=direction)
    assert rows.shape == (65,) and mean.shape == () and rows.dtype == mean.dtype == accumulator(dtype)
    torch.testing.assert_close(rows.mean(), mean)


def test_student_to_teacher_is_teacher_to_student_with_roles_changed(backend: str) -> None:
    student, teacher = pair()
    one = lk.info_nce(student, teacher, direction="student_to_teacher")
    other = lk.info_nce(teacher, student, direction="teacher_to_student")
    both = lk.info_nce(student, teacher, direction="symmetric")
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(both, (one + lk.info_nce(student, teacher, direction="teacher_to_student")) / 2)


UPSTREAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": torch.ones_like,
    "expanded": lambda losses: losses.new_ones(()).expand_as(losses),
    "strided": lambda losses: randn(2 * len(losses))[::2],
}


@pytest.mark.parametrize("make_upstream", UPSTREAMS.values(), ids=UPSTREAMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_upstream_gradients_of_any_stride(backend: str, direction: str, make_upstream: Callable) -> None:
    inputs = pair()
    losses = lk.info_nce(*inputs, direction=direction, reduction="none")
    upstream = make_upstream(losses)
    results = torch.autograd.grad(losses, inputs, upstream, retain_graph=True)
    expected = torch.autograd.grad(losses, inputs, upstream.clone(memory_format=torch.contiguous_format))
    for result, same in zip(results, expected, strict=True):
        torch.testing.assert_close(result, same)
