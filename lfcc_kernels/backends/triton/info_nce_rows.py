"""Prologue and epilogue of the info_nce kernels, per row of one side: rows are packed before the products, and the
gradients of packed rows are turned into those of the rows after them.

A packed row is the row times a power of two and `factors` restore the unit row (docs/kernels.md, "Packed rows").

Bytes: each row is read once from memory and written once. FLOPs: 4 per element.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfcc_kernels.backends.dtypes import accumulator
from lfcc_kernels.backends.triton import runtime
from lfcc_kernels.backends.triton.tiles import table, tiles

EPS = tl.constexpr(1e-12)  # lower bound of a norm, as in torch.nn.functional.normalize


@triton.jit
def _inverse_power_of_two(value):
    """One over the largest power of two up to `value`, clamped to 2^-100 and 2^100 (2^-900 and 2^900 for float64)."""
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
    NORMALIZE: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pack rows and return, per row, its factor f, 1 / max(norm, EPS), and its projection: f if the gradient of the
    row loses its part along the row, otherwise 0."""
    step = tl.arange(0, BLOCK_D)
    source_row = source + row[:, None].to(tl.int64) * stride_row
    target_row = target + row[:, None].to(tl.int64) * padded
    scale = tl.where(inside, 1.0, 1.0).to(ACC_DTYPE)
    if NORMALIZE:
        absmax = tl.zeros(row.shape, ACC_DTYPE)
        for d0 in tl.range(0, width, BLOCK_D):
            mask = inside[:, None] & (d0 + step < width)[None, :]
            values = tl.load(source_row + (d0 + step)[None, :] * stride_column, mask=mask, other=0.0).to(ACC_DTYPE)
            absmax = tl.maximum(absmax, tl.max(tl.abs(values), 1))
        scale = _inverse_power_of_two(absmax)
    squares = tl.zeros(row.shape, ACC_DTYPE)
    for d0 in tl.range(0, padded, BLOCK_D):
        mask = inside[:, None] & (d0 + step < width)[None, :]
        values = tl.load(source_row + (d0 + step)[None, :] * stride_column, mask=mask, other=0.0).to(ACC_DTYPE)
        values *= scale[:, None]
        squares += tl.sum(values * values, 1)
        place = target_row + (d0 + step)[None, :]
        tl.store(place, values.to(target.dtype.element_ty), mask=inside[:, None] & (d0 + step < padded)[None, :])
    factor, inverse_norm, projection = scale, scale, scale * 0
    if NORMALIZE:
        norm = tl.sqrt(squares)
        factor = 1.0 / tl.maximum(norm, scale * EPS, propagate_nan=tl.PropagateNan.ALL)
        inverse_norm = factor * scale
        projection = tl.where(norm > scale * EPS, factor, 0.0)
    return factor, inverse_norm, projection


@triton.jit
def store_inverse(temperature, inverse_temperature, BY_VALUE: tl.constexpr, ACC_DTYPE: tl.constexpr):
    """1 / temperature, or NaN if a temperature in device memory, which the host does not read, is not positive and
    finite."""
    value = tl.full((), temperature, ACC_DTYPE) if BY_VALUE else tl.load(temperature).to(ACC_DTYPE)
    valid = (value > 0) & (value < float("inf"))
    tl.store(inverse_temperature, tl.where(valid, 1.0 / value, float("nan")))


@triton.jit
def pack_kernel(
    student, teacher, temperature, packed_student, packed_teacher, factors, inverse_norms, projections,
    inverse_temperature, batch, key_count, width, padded, student_row, student_column, teacher_row, teacher_column,
    NORMALIZE: tl.constexpr, BY_VALUE: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program packs BLOCK_B rows; the grid covers the student's rows, then the teacher's, and so do the outputs."""
    if tl.program_id(0) == 0:
        store_inverse(temperature, inverse_temperature, BY_VALUE, ACC_DTYPE)
    blocks = tl.cdiv(batch, BLOCK_B)
    of_teacher = tl.program_id(0) >= blocks
    row = (tl.program_id(0) - tl.where(of_teacher, blocks, 0)) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < tl.where(of_teacher, key_count, batch)
    factor, inverse_norm, projection = pack_rows(
        tl.where(of_teacher, teacher, student), tl.where(of_teacher, packed_teacher, packed_student), row, inside,
        width, padded, tl.where(of_teacher, teacher_row, student_row).to(tl.int64),
        tl.where(of_teacher, teacher_column, student_column).to(tl.int64), NORMALIZE, ACC_DTYPE, BLOCK_D,
    )  # fmt: skip
    place = tl.where(of_teacher, batch, 0) + row
    tl.store(factors + place, factor, mask=inside)
    tl.store(inverse_norms + place, inverse_norm, mask=inside)
    tl.store(projections + place, projection, mask=inside)


@triton.jit
def epilogue_rows(
    acc, packed, inverse_norms, projections, scale, result, row, inside, width, padded, stride_row,
    ACC_DTYPE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of rows from acc_i = sum_j W_ij f_j packed_j: scaled by `scale`, and without the part along the row,
    which the norm takes away."""
    step = tl.arange(0, BLOCK_D)
    acc_row = acc + row[:, None].to(tl.int64) * padded
    packed_row = packed + row[:, None].to(tl.int64) * padded
    result_row = result + row[:, None].to(tl.int64) * stride_row
    projection = tl.load(projections + row, mask=inside, other=0.0)
    scale *= tl.load(inverse_norms + row, mask=inside, other=0.0)
    dot = tl.zeros(row.shape, ACC_DTYPE)
    for d0 in tl.range(0, width, BLOCK_D):
        mask = inside[:, None] & (d0 + step < width)[None, :]
        total = tl.load(acc_row + (d0 + step)[None, :], mask=mask, other=0.0)
        dot += tl.sum(total * tl.load(packed_row + (d0 + step)[None, :], mask=mask, other=0.0).to(ACC_DTYPE), 1)
    for d0 in tl.range(0, width, BLOCK_D):
        mask = inside[:, None] & (d0 + step < width)[None, :]
        total = tl.load(acc_row + (d0 + step)[None, :], mask=mask, other=0.0)
        unit = projection[:, None] * tl.load(packed_row + (d0 + step)[None, :], mask=mask, other=0.0).to(ACC_DTYPE)
        value = scale[:, None] * (total - (dot * projection)[:, None] * unit)
        tl.store(result_row + (d0 + step)[None, :], value.to(result.dtype.element_ty), mask=mask)


@triton.jit
def epilogue_kernel(
    acc, packed, inverse_norms, projections, inverse_temperature, grad_absmax, result, rows, width, padded, stride_row,
    LOSS_SCALE: tl.constexpr, BY_ABSMAX: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_B rows from acc = LOSS_SCALE / grad_absmax sum_j W_ij f_j packed_j."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    scale = tl.load(inverse_temperature) / LOSS_SCALE
    if BY_ABSMAX:
        scale *= tl.load(grad_absmax)
    epilogue_rows(
        acc, packed, inverse_norms, projections, scale, result, row, row < rows, width, padded, stride_row,
        ACC_DTYPE, BLOCK_D,
    )  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Packed rows of both sides, and the other inputs of the kernels of a pair."""

    student: Tensor  # (B, padded)
    teacher: Tensor  # (K, padded)
    width: int
    fused: bool  # whether the rows are padded for the tiles of `info_nce_fused.py`
    factors: Tensor  # (B + K,), as the next two
    inverse_norms: Tensor
    projections: Tensor
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
        """The ids of both sides; without ids, arbitrary tensors, which are not read."""
        if self.student_ids is None or self.teacher_ids is None:
            return self.factors, self.factors
        return self.student_ids, self.teacher_ids

    @property
    def acc_dtype(self) -> torch.dtype:
        return self.factors.dtype

    @property
    def loss_scale(self) -> float:
        """Keeps gradient weights, at most 1 in magnitude, inside the range of float16."""
        return loss_scale(self.student.dtype)

    def new_stats(self, *shape: int) -> Tensor:
        """An uninitialised tensor of the accumulator's dtype; one per output, because outputs must not alias."""
        return self.factors.new_empty(shape)

    def tiles(self, kernel: str) -> dict[str, int]:
        return tiles(kernel, str(self.student.element_size()), runtime.device_props(self.student.device).capability)


@dataclass(frozen=True)
class Upstream:
    """Further inputs of a gradient, and the side whose rows it is for."""

    grad: Tensor  # (B,), of each row's loss
    row_lse: Tensor  # (B,), from the forward pass
    col_lse: Tensor  # (B,), of the positives' columns; empty unless symmetric
    grad_absmax: Tensor | None  # (), a divisor of the weights
    symmetric: bool
    of_teacher: bool


def loss_scale(dtype: torch.dtype) -> float:
    return 2.0**15 if dtype == torch.float16 else 1.0


def pack(
    student: Tensor, teacher: Tensor, temperature: Tensor, student_ids: Tensor | None, teacher_ids: Tensor | None,
    positive_offset: int, normalize: bool,
) -> Pair:  # fmt: skip
    """Pack the rows of both sides in one launch, for the algorithm that suits their number and width."""
    batch, width = student.shape
    keys, acc_dtype = len(teacher), accumulator(student.dtype)
    capability = runtime.device_props(student.device).capability
    limits = table(capability)["fused"].get(str(student.element_size()))  # None for float64, which has no fused tiles
    tile = max(16, triton.next_power_of_2(width))
    fused = limits is not None and tile <= limits["widest"] and batch >= limits["fewest_rows"]
    padded = tile if fused else triton.cdiv(width, 16) * 16
    packed = student.new_empty(batch + keys, padded)
    stats = student.new_empty(3, batch + keys, dtype=acc_dtype)
    inverse_temperature = stats.new_empty(1)
    given = kernel_temperature(temperature, stats)
    block = tiles("pack", str(student.element_size()), capability)
    pack_kernel[(triton.cdiv(batch, block["BLOCK_B"]) + triton.cdiv(keys, block["BLOCK_B"]),)](
        student, teacher, given, packed, packed[batch:], *stats, inverse_temperature, batch, keys, width, padded,
        *student.stride(), *teacher.stride(), NORMALIZE=normalize, BY_VALUE=isinstance(given, float),
        ACC_DTYPE=runtime.to_tl_dtype(acc_dtype), **block,
    )  # fmt: skip
    factors, inverse_norms, projections = stats
    ids_s, ids_t = (None if ids is None else ids.contiguous() for ids in (student_ids, teacher_ids))
    return Pair(
        packed[:batch], packed[batch:], width, fused, factors, inverse_norms, projections, inverse_temperature,
        ids_s, ids_t, positive_offset,
    )  # fmt: skip


def epilogue(pair: Pair, acc: Tensor, of_teacher: bool, grad_absmax: Tensor | None, result: Tensor) -> None:
    """Write the gradient of one side's rows to result (rows, D), from acc as `epilogue_kernel` reads it."""
    packed = pair.teacher if of_teacher else pair.student
    side = slice(pair.batch, None) if of_teacher else slice(pair.batch)
    block = pair.tiles("epilogue")
    epilogue_kernel[(triton.cdiv(len(acc), block["BLOCK_B"]),)](
        acc, packed, pair.inverse_norms[side], pair.projections[side], pair.inverse_temperature,
        acc if grad_absmax is None else grad_absmax, result, len(acc), pair.width, packed.shape[1], result.stride(0),
        LOSS_SCALE=pair.loss_scale, BY_ABSMAX=grad_absmax is not None, ACC_DTYPE=runtime.to_tl_dtype(pair.acc_dtype),
        **block,
    )  # fmt: skip


def kernel_temperature(temperature: Tensor, stats: Tensor) -> Tensor | float:
    """The temperature as a kernel argument: by value if it is on the CPU, which avoids a copy, otherwise a tensor."""
    if temperature.device.type != "cpu":
        return temperature.to(stats.device)
    value = temperature.item()
    if not 0 < value < float("inf"):
        raise ValueError(f"info_nce: temperature is {value}; expected a positive finite number, such as 0.1")
    # Triton passes Python numbers as float32.
    return stats.new_full((), value) if stats.dtype == torch.float64 else value
