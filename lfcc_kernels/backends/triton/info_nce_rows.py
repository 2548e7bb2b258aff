"""Kernels over the rows of one side: packed before the products, and their gradients finished after them.

A packed row is the row times a power of two that brings its largest value near one: an exact step, after which no
product of two rows overflows, whatever the lengths were. With `factor` f the unit row is f times the packed one, so

    A_ij = <packed_i, packed_j> f_i f_j / temperature

and rows as they are (normalize=False) are packed with all factors 1. Packed rows lie without gaps, padded with zeros.

Bytes: a row read once from memory, written once. FLOPs: 4 an element.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfcc_kernels.backends.dtypes import accumulator
from lfcc_kernels.backends.triton import runtime
from lfcc_kernels.backends.triton.tiles import tiles

EPS = tl.constexpr(1e-12)  # the least norm, as in torch.nn.functional.normalize


@triton.jit
def _inverse_power_of_two(value):
    """One over the largest power of two up to `value`, between 2^-100 and 2^100 (2^-900 and 2^900 of float64)."""
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        power = tl.minimum(tl.maximum(bits.to(tl.float64, bitcast=True), 2.0**-900), 2.0**900)
        inverse = 1.0 / power
    else:
        bits = value.to(tl.int32, bitcast=True) & 0x7F800000
        power = tl.minimum(tl.maximum(bits.to(tl.float32, bitcast=True), 2.0**-100), 2.0**100)
        inverse = tl.div_rn(tl.full(value.shape, 1.0, tl.float32), power)
    return inverse


@triton.jit
def pack_rows(
    source, target, row, inside, width, padded, stride_row, stride_column,
    NORMALIZE: tl.constexpr, SUM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Packs rows and returns their numbers: f, 1 / max(norm, EPS), and f again where the gradient of a unit row must
    lose its part along the row, else 0."""
    step = tl.arange(0, BLOCK_D)
    from_rows = source + row[:, None].to(tl.int64) * stride_row
    to_rows = target + row[:, None].to(tl.int64) * padded
    scale = tl.where(inside, 1.0, 1.0).to(SUM)
    if NORMALIZE:
        largest = tl.zeros(row.shape, SUM)
        for d0 in tl.range(0, width, BLOCK_D):
            mask = inside[:, None] & (d0 + step < width)[None, :]
            values = tl.load(from_rows + (d0 + step)[None, :] * stride_column, mask=mask, other=0.0).to(SUM)
            largest = tl.maximum(largest, tl.max(tl.abs(values), 1))
        scale = _inverse_power_of_two(largest)
    squares = tl.zeros(row.shape, SUM)
    for d0 in tl.range(0, padded, BLOCK_D):
        mask = inside[:, None] & (d0 + step < width)[None, :]
        values = tl.load(from_rows + (d0 + step)[None, :] * stride_column, mask=mask, other=0.0).to(SUM)
        values *= scale[:, None]
        squares += tl.sum(values * values, 1)
        place = to_rows + (d0 + step)[None, :]
        tl.store(place, values.to(target.dtype.element_ty), mask=inside[:, None] & (d0 + step < padded)[None, :])
    factor, inverse_length, tangent = scale, scale, scale * 0
    if NORMALIZE:
        norm = tl.sqrt(squares)
        factor = 1.0 / tl.maximum(norm, scale * EPS, propagate_nan=tl.PropagateNan.ALL)
        inverse_length = factor * scale
        tangent = tl.where(norm > scale * EPS, factor, 0.0)
    return factor, inverse_length, tangent


@triton.jit
def store_inverse(temperature, inverse_temperature, BY_VALUE: tl.constexpr, SUM: tl.constexpr):
    """1 / temperature; NaN where one in device memory, which no host reads, is not positive and finite."""
    value = tl.full((), temperature, SUM) if BY_VALUE else tl.load(temperature).to(SUM)
    valid = (value > 0) & (value < float("inf"))
    tl.store(inverse_temperature, tl.where(valid, 1.0 / value, float("nan")))


@triton.jit
def pack_kernel(
    student, teacher, temperature, packed_student, packed_teacher, factors, inverse_lengths, tangents,
    inverse_temperature, batch, key_count, width, padded, student_row, student_column, teacher_row, teacher_column,
    NORMALIZE: tl.constexpr, BY_VALUE: tl.constexpr, SUM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_B rows of the student, then of the teacher, whose numbers follow each other likewise."""
    if tl.program_id(0) == 0:
        store_inverse(temperature, inverse_temperature, BY_VALUE, SUM)
    blocks = tl.cdiv(batch, BLOCK_B)
    of_teacher = tl.program_id(0) >= blocks
    row = (tl.program_id(0) - tl.where(of_teacher, blocks, 0)) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < tl.where(of_teacher, key_count, batch)
    numbers = pack_rows(
        tl.where(of_teacher, teacher, student), tl.where(of_teacher, packed_teacher, packed_student), row, inside,
        width, padded, tl.where(of_teacher, teacher_row, student_row).to(tl.int64),
        tl.where(of_teacher, teacher_column, student_column).to(tl.int64), NORMALIZE, SUM, BLOCK_D,
    )  # fmt: skip
    place = tl.where(of_teacher, batch, 0) + row
    tl.store(factors + place, numbers[0], mask=inside)
    tl.store(inverse_lengths + place, numbers[1], mask=inside)
    tl.store(tangents + place, numbers[2], mask=inside)


@triton.jit
def finish_rows(
    sums, packed, inverse_lengths, tangents, outer, result, row, inside, width, padded, stride_row,
    SUM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of rows as they came, from sums_i = sum_j W_ij f_j packed_j: times `outer`, and through the norm, whose
    gradient takes off the part along the row."""
    step = tl.arange(0, BLOCK_D)
    from_sums = sums + row[:, None].to(tl.int64) * padded
    from_packed = packed + row[:, None].to(tl.int64) * padded
    to_rows = result + row[:, None].to(tl.int64) * stride_row
    tangent = tl.load(tangents + row, mask=inside, other=0.0)
    outer *= tl.load(inverse_lengths + row, mask=inside, other=0.0)
    along = tl.zeros(row.shape, SUM)
    for d0 in tl.range(0, width, BLOCK_D):
        mask = inside[:, None] & (d0 + step < width)[None, :]
        total = tl.load(from_sums + (d0 + step)[None, :], mask=mask, other=0.0)
        along += tl.sum(total * tl.load(from_packed + (d0 + step)[None, :], mask=mask, other=0.0).to(SUM), 1)
    for d0 in tl.range(0, width, BLOCK_D):
        mask = inside[:, None] & (d0 + step < width)[None, :]
        total = tl.load(from_sums + (d0 + step)[None, :], mask=mask, other=0.0)
        unit = tangent[:, None] * tl.load(from_packed + (d0 + step)[None, :], mask=mask, other=0.0).to(SUM)
        value = outer[:, None] * (total - (along * tangent)[:, None] * unit)
        tl.store(to_rows + (d0 + step)[None, :], value.to(result.dtype.element_ty), mask=mask)


@triton.jit
def finish_kernel(
    sums, packed, inverse_lengths, tangents, inverse_temperature, magnitude, result, rows, width, padded, stride_row,
    GAIN: tl.constexpr, RELATIVE: tl.constexpr, SUM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_B rows from GAIN / magnitude sum_j W_ij f_j packed_j."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    outer = tl.load(inverse_temperature) / GAIN
    if RELATIVE:
        outer *= tl.load(magnitude)
    finish_rows(
        sums, packed, inverse_lengths, tangents, outer, result, row, row < rows, width, padded, stride_row, SUM, BLOCK_D
    )


@dataclass(frozen=True)
class Pair:
    """Both sides packed, and what else the kernels of a pair read."""

    student: Tensor  # (B, padded)
    teacher: Tensor  # (K, padded)
    width: int
    factors: Tensor  # (B + K,), and so the next two
    inverse_lengths: Tensor
    tangents: Tensor
    inverse_temperature: Tensor  # (1,)
    student_ids: Tensor | None
    teacher_ids: Tensor | None
    positive_offset: int

    @property
    def batch(self) -> int:
        return len(self.student)

    @property
    def keys(self) -> int:
        return len(self.teacher)

    @property
    def side_factors(self) -> tuple[Tensor, Tensor]:
        return self.factors[: self.batch], self.factors[self.batch :]

    @property
    def has_ids(self) -> bool:
        return self.student_ids is not None

    @property
    def ids(self) -> tuple[Tensor, Tensor]:
        """The ids of both sides, or where there are none any tensors, which are not read."""
        if self.student_ids is None or self.teacher_ids is None:
            return self.factors, self.factors
        return self.student_ids, self.teacher_ids

    @property
    def total(self) -> torch.dtype:
        """The type sums are taken in."""
        return self.factors.dtype

    @property
    def gain(self) -> float:
        """Factor that keeps weights, at most 1 in size, inside the range of float16."""
        return 2.0**15 if self.student.dtype == torch.float16 else 1.0

    def numbers(self, *shape: int) -> Tensor:
        """An empty tensor of the type sums are taken in; one a result, since those of an op may not share memory."""
        return self.factors.new_empty(shape)

    def tiles(self, kernel: str) -> dict[str, int]:
        architecture = runtime.chip(self.student.device).capability
        return tiles(kernel, str(self.student.element_size()), architecture)


def pack(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    positive_offset: int,
    normalize: bool,
    padded: int,
) -> Pair:
    """Pack both sides' rows, of `padded` values each, in one launch."""
    batch, width = student.shape
    keys, total = len(teacher), accumulator(student.dtype)
    packed = student.new_empty(batch + keys, padded)
    numbers = student.new_empty(3, batch + keys, dtype=total)
    inverse_temperature = numbers.new_empty(1)
    given = given_temperature(temperature, numbers)
    block = tiles("pack", str(student.element_size()), runtime.chip(student.device).capability)
    pack_kernel[(triton.cdiv(batch, block["BLOCK_B"]) + triton.cdiv(keys, block["BLOCK_B"]),)](
        student, teacher, given, packed, packed[batch:], *numbers, inverse_temperature, batch, keys, width, padded,
        *student.stride(), *teacher.stride(), NORMALIZE=normalize, BY_VALUE=isinstance(given, float),
        SUM=runtime.in_triton(total), **block,
    )  # fmt: skip
    ids = (None if ids is None else ids.contiguous() for ids in (student_ids, teacher_ids))
    return Pair(packed[:batch], packed[batch:], width, *numbers, inverse_temperature, *ids, positive_offset)


def finish(pair: Pair, sums: Tensor, of_teacher: bool, magnitude: Tensor | None, result: Tensor) -> None:
    """Gradient of one side's rows as they came into result (rows, D), from the sums that `finish_kernel` takes."""
    packed = pair.teacher if of_teacher else pair.student
    own = slice(pair.batch, None) if of_teacher else slice(pair.batch)
    block = pair.tiles("finish")
    finish_kernel[(triton.cdiv(len(sums), block["BLOCK_B"]),)](
        sums, packed, pair.inverse_lengths[own], pair.tangents[own], pair.inverse_temperature,
        sums if magnitude is None else magnitude, result, len(sums), pair.width, packed.shape[1],
        result.stride(0), GAIN=pair.gain, RELATIVE=magnitude is not None, SUM=runtime.in_triton(pair.total), **block,
    )  # fmt: skip


def given_temperature(temperature: Tensor, numbers: Tensor) -> Tensor | float:
    """As the kernel takes it: by value from the CPU, so that nothing waits for a copy, else where it lies."""
    if temperature.device.type != "cpu":
        return temperature.to(numbers.device)
    value = temperature.item()
    if not 0 < value < float("inf"):
        raise ValueError(f"info_nce: temperature is {value}; expected a positive finite number, as 0.1")
    # Triton takes numbers as float32.
    return numbers.new_full((), value) if numbers.dtype == torch.float64 else value
