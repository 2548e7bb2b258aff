"""`info_nce` and its gradients on the kernels, over the sizes, options and dtypes that take different paths in them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grids import grid
from oracles import accumulator, assert_close_to_truth, gradients, in_float64, rounding, torch_info_nce
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
    "several chunks, wide and odd": (130, 300, 150, 515),
    "one over a block of rows": (129, 129, 0, 32),
    "one over a tile of keys": (9, 1025, 1016, 5),
    "several tiles of keys, several parts of a row": (20, 300, 250, 2051),
    "keys of three ranks, the middle one's": (64, 192, 64, 32),
    "positives at the end of the keys": (65, 300, 235, 33),
    "a queue longer than a tile": (7, 1100, 600, 32),
}
# More pairs than the CPU kernels process at once and more keys than a block of the CUDA kernels stores; more blocks of
# keys than parts of the work. Triton's interpreter would need many equal steps.
LARGE = {"many pairs": (33, 8199, 8160, 3), "many blocks": (2, 16500, 16498, 3)}

# Which of student, teacher and temperature require gradients. One kernel computes loss and gradient if the student or
# the temperature does, unless the loss is symmetric; the teacher's gradient needs another kernel.
LEARNS = {"all learn": "stT", "frozen teacher": "sT", "frozen student": "t", "nothing learns": ""}


def check(student: Tensor, teacher: Tensor, **options: Any) -> None:
    """Compares the loss and all gradients with the reference."""
    temperature = options.pop("temperature", 0.1)
    temperature = temperature if isinstance(temperature, Tensor) else torch.tensor(temperature).double()
    inputs = [student, teacher, temperature]
    exact_inputs = in_float64(*inputs)
    loss = lk.info_nce(student, teacher, temperature=temperature, **options)
    reference = torch_info_nce(student, teacher, temperature=temperature, **options)
    truth = torch_info_nce(*exact_inputs[:2], temperature=exact_inputs[2], **options)

    # No logit is larger than this; its rounding limits the precision of all results.
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
            # Roundings of a sum add up as those of a random walk: over the rows, or over the tiles of very many keys.
            steps = max(len(student) if loss.dim() else 1, len(teacher) / 1024)
            largest = logit / temperature.item() * steps**0.5
        else:
            shortest = min(length.min().item() for length in lengths) if key_length == 1.0 else 1.0
            largest = key_length / shortest / temperature.item() / (1 if loss.dim() else len(student))
        floor = rounding(result.dtype, exact) + precision * largest * upstream.abs().max().item()
        assert_close_to_truth(result, torch_gradient, exact, factor=3, floor=floor)


def pair(
    batch: int = 65, keys: int = 65, width: int = 33, dtype: torch.dtype = torch.float32, learns: str = "st"
) -> list[Tensor]:
    """Student and teacher rows that resemble each other a little."""
    common = randn(max(batch, keys), width)
    sides = [(common[:rows] + 2 * randn(rows, width)).to(dtype) for rows in (batch, keys)]
    return [side.requires_grad_(name in learns) for side, name in zip(sides, "st", strict=True)]


# Paths branch on the size: blocks of 64 to 256 rows and tiles of 1024 keys in the CPU kernels; fused tiles for at least
# 64 rows of at most 64 or 128 values, otherwise chunks, in the CUDA and Triton kernels. They branch on the bytes of an
# element (float64 is never fused), on the direction and on what learns. The other options change the numbers in a tile
# and not its form, so each size meets them once; ids and layouts have grids of their own.
@grid(
    size=SIZES,
    dtype=DTYPES,
    direction=DIRECTIONS,
    learns=LEARNS,
    normalize=[True, False],
    reduction=["mean", "none"],
    named=[
        ("one over it", torch.float16, "symmetric", "all learn", True, "none"),
        ("several chunks, wide and odd", torch.float16, "symmetric", "all learn", True, "mean"),
        ("positives at the end of the keys", torch.bfloat16, "symmetric", "all learn", True, "mean"),
        ("positives at the end of the keys", torch.float32, "student_to_teacher", "frozen teacher", True, "mean"),
        ("keys of three ranks, the middle one's", torch.float32, "symmetric", "frozen teacher", True, "mean"),
        ("keys of three ranks, the middle one's", torch.bfloat16, "student_to_teacher", "frozen teacher", True, "mean"),
    ],
)
def test_sizes(
    kernels: str,
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    direction: str,
    learns: str,
    normalize: bool,
    reduction: str,
) -> None:
    batch, keys, offset, width = size
    temperature = torch.tensor(0.1 if normalize else width / 16, dtype=accumulator(dtype), requires_grad="T" in learns)
    check(
        *pair(batch, keys, width, dtype, learns), temperature=temperature, direction=direction,
        positive_offset=offset, normalize=normalize, reduction=reduction,
    )  # fmt: skip


@pytest.mark.parametrize("kernels", ["cpu", "cuda"], indirect=True)
@grid(size=LARGE, dtype=[torch.float64, torch.float32, torch.bfloat16], direction=DIRECTIONS, learns=LEARNS)
def test_large_sizes(
    kernels: str, size: tuple[int, int, int, int], dtype: torch.dtype, direction: str, learns: str
) -> None:
    batch, keys, offset, width = size
    temperature = torch.tensor(0.1, dtype=accumulator(dtype), requires_grad="T" in learns)
    sides = pair(batch, keys, width, dtype, learns)
    check(*sides, temperature=temperature, direction=direction, positive_offset=offset)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("learns", ["s", "t", "T", "st", "sT", "tT", "stT", ""])
def test_gradients_for_every_subset(kernels: str, learns: str, direction: str) -> None:
    """Of rows in fused tiles; which gradients an op returns is the same for chunks."""
    temperature = torch.tensor(0.1, requires_grad="T" in learns)
    check(*pair(65, 70, learns=learns), temperature=temperature, direction=direction, positive_offset=5)


# A temperature multiplies logits and divides gradients on every path alike; what is its own is the dtype in which it
# comes, and the range of exp at either end.
@grid(
    temperature=[0.005, 0.1, 1.0, 10.0],
    own=["constant", torch.float32, torch.float64],
    dtype=[torch.float32, torch.float64],
    reduction=["mean", "none"],
    direction=DIRECTIONS,
)
def test_temperatures(
    kernels: str, temperature: float, own: torch.dtype | str, dtype: torch.dtype, reduction: str, direction: str
) -> None:
    value = temperature if own == "constant" else torch.tensor(temperature, dtype=own, requires_grad=True)
    check(*pair(dtype=dtype), temperature=value, direction=direction, reduction=reduction)


IDS: dict[str, Callable[[int], Tensor]] = {
    "all different": lambda rows: torch.arange(rows),
    "five classes": lambda rows: torch.arange(rows) % 5,
    "repeats side by side": lambda rows: torch.arange(rows) // 2,
    "mirror partners, as mixup makes": lambda rows: torch.minimum(torch.arange(rows), rows - 1 - torch.arange(rows)),
    "all equal": lambda rows: torch.full((rows,), 7),
    "large and negative": lambda rows: (torch.arange(rows) % 3 - 1) * 2**62,
}


# Ids are compared wherever logits are made: in fused tiles (width 33) and chunks (width 133 or float64), for rows and
# for columns. The kind decides how many are left out, up to all but the positive.
@grid(
    kind=IDS,
    keys=[70, 600],
    width=[33, 133],
    dtype=[torch.float64, torch.float32, torch.bfloat16],
    direction=DIRECTIONS,
    learns=LEARNS,
    named=[
        ("five classes", 70, 33, torch.bfloat16, "symmetric", "all learn"),
        ("five classes", 600, 133, torch.float32, "symmetric", "all learn"),
        ("all equal", 600, 33, torch.float32, "symmetric", "all learn"),
        ("repeats side by side", 600, 33, torch.float32, "student_to_teacher", "frozen teacher"),
        ("large and negative", 70, 33, torch.float32, "symmetric", "all learn"),
        ("large and negative", 70, 133, torch.float64, "symmetric", "all learn"),
    ],
)
def test_ids(
    kernels: str, kind: Callable[[int], Tensor], keys: int, width: int, dtype: torch.dtype, direction: str, learns: str
) -> None:
    offset, teacher_ids = keys - 66, kind(keys)
    check(
        *pair(65, keys, width, dtype, learns), temperature=torch.tensor(0.1, requires_grad="T" in learns),
        direction=direction, student_ids=teacher_ids[offset : offset + 65], teacher_ids=teacher_ids,
        positive_offset=offset,
    )  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ids_that_differ_between_the_sides(kernels: str, direction: str) -> None:
    """A positive counts whatever its ids are; only other pairs are left out."""
    student_ids, teacher_ids = torch.randint(4, (65,)), torch.randint(4, (65,))
    check(*pair(), direction=direction, student_ids=student_ids, teacher_ids=teacher_ids)


def test_ids_of_any_integer_type_and_stride(kernels: str) -> None:
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


@grid(layout=ROW_LAYOUTS, side=["student", "teacher"], direction=DIRECTIONS)
def test_layouts(kernels: str, layout: Callable[[], Tensor], side: str, direction: str) -> None:
    """Rows are read in place or copied before the direction matters."""
    sides = [layout().requires_grad_(), randn(65, 33, requires_grad=True)]
    sides = sides if side == "student" else sides[::-1]
    before = [side.detach().clone() for side in sides]
    check(*sides, direction=direction)
    assert all(torch.equal(*both) for both in zip(sides, before, strict=True))


def test_rows_further_apart_than_32_bits_count(kernels: str) -> None:
    rows, apart = randn(3, 20).bfloat16(), 2**30 + 8
    memory = torch.empty(2 * apart + 20, dtype=torch.bfloat16)
    student = memory.as_strided((3, 20), (apart, 1)).copy_(rows)
    torch.testing.assert_close(lk.info_nce(student, rows.flip(1)), lk.info_nce(rows, rows.flip(1)))
