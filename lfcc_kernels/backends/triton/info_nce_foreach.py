"""Many small pairs in five launches: a whole LFCC loss, stages x scales of them, where launches cost more than work.

All pairs have the same B rows and K keys and each its own width. In turn, every launch over all groups:

    pack       rows of both sides, as in `info_nce_rows.py`
    products   (SPLITS, groups, B, K), the width cut into SPLITS shares
    softmax    `one_pass_kernel` of `info_nce_chunks.py`: losses and weights
    sums       of weighted keys, one program a tile of rows and columns
    finish     gradients of the rows

Products of all pairs are in memory together, so this way is for few: the table says up to how many.
FLOPs: 4 B K D a pair. Bytes: 4 (SPLITS + 1) + 2 a product, and both sides read twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfcc_kernels.backends.triton import info_nce_chunks as chunks
from lfcc_kernels.backends.triton import info_nce_rows as rows
from lfcc_kernels.backends.triton import runtime
from lfcc_kernels.backends.triton.info_nce import packed
from lfcc_kernels.backends.triton.info_nce_rows import finish
from lfcc_kernels.backends.triton.tiles import cut, table, tiles

SPLITS = 8  # shares of the widths: a row of the finest scale has thousands of values


@triton.jit
def _place(group, WIDTHS: tl.constexpr):
    """Width of a group's rows, the same padded, and the columns before it, padded and not."""
    width, padded, before_padded, before = 0, 0, 0, 0
    sum_padded, total = 0, 0
    for n in tl.static_range(len(WIDTHS)):
        width = tl.where(group == n, WIDTHS[n], width)
        padded = tl.where(group == n, (WIDTHS[n] + 15) // 16 * 16, padded)
        before_padded = tl.where(group == n, sum_padded, before_padded)
        before = tl.where(group == n, total, before)
        sum_padded, total = sum_padded + (WIDTHS[n] + 15) // 16 * 16, total + WIDTHS[n]
    return width, padded, before_padded.to(tl.int64), before


@triton.jit
def pack_kernel(
    students, teachers, student_strides, teacher_strides, temperature, packed, factors, inverse_lengths, tangents,
    inverse_temperature, batch, key_count,
    WIDTHS: tl.constexpr, NORMALIZE: tl.constexpr, BY_VALUE: tl.constexpr, SUM: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_B rows of one group, of the student, then of the teacher."""
    group, blocks = tl.program_id(1), tl.cdiv(batch, BLOCK_B)
    if (tl.program_id(0) == 0) & (group == 0):
        rows.store_inverse(temperature, inverse_temperature, BY_VALUE, SUM)
    of_teacher = tl.program_id(0) >= blocks
    source, stride = students[0], student_strides[0]
    for n in tl.static_range(len(WIDTHS)):
        source = tl.where(group == n, tl.where(of_teacher, teachers[n], students[n]), source)
        stride = tl.where(group == n, tl.where(of_teacher, teacher_strides[n], student_strides[n]), stride)
    width, padded, before_padded, _ = _place(group, WIDTHS)
    side = tl.where(of_teacher, batch, 0)
    row = (tl.program_id(0) - tl.where(of_teacher, blocks, 0)) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < tl.where(of_teacher, key_count, batch)
    target = packed + (batch + key_count) * before_padded + side.to(tl.int64) * padded
    numbers = rows.pack_rows(
        source, target, row, inside, width, padded, stride.to(tl.int64), 1, NORMALIZE, SUM, BLOCK_D
    )
    place = group.to(tl.int64) * (batch + key_count) + side + row
    tl.store(factors + place, numbers[0], mask=inside)
    tl.store(inverse_lengths + place, numbers[1], mask=inside)
    tl.store(tangents + place, numbers[2], mask=inside)


@triton.jit
def products_kernel(
    packed, products, batch, key_count,
    WIDTHS: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one group's products over its share of the width."""
    blocks = tl.cdiv(batch, BLOCK_B)
    group, split = tl.program_id(2), tl.program_id(1)
    row = (tl.program_id(0) % blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    col = (tl.program_id(0) // blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    step = tl.arange(0, BLOCK_D)
    _width, padded, before_padded, _before = _place(group, WIDTHS)
    students = packed + (batch + key_count) * before_padded + row[:, None].to(tl.int64) * padded
    teachers = packed + (batch + key_count) * before_padded + (batch + col)[:, None].to(tl.int64) * padded
    sums = tl.zeros((BLOCK_B, BLOCK_K), SUM)
    for d0 in tl.range(split * BLOCK_D, padded, tl.num_programs(1) * BLOCK_D):
        mask = (d0 + step < padded)[None, :]
        queries = tl.load(students + (d0 + step)[None, :], mask=mask & (row < batch)[:, None], other=0.0)
        keys = tl.load(teachers + (d0 + step)[None, :], mask=mask & (col < key_count)[:, None], other=0.0)
        sums = tl.dot(queries.to(PRODUCT), tl.trans(keys.to(PRODUCT)), sums, input_precision=PRECISION, out_dtype=SUM)
    part = (split * tl.num_programs(2) + group).to(tl.int64) * batch * key_count
    place = products + part + row[:, None].to(tl.int64) * key_count + col[None, :]
    tl.store(place, sums, mask=(row < batch)[:, None] & (col < key_count)[None, :])


@triton.jit
def sums_kernel(
    weights, packed, sums, batch, key_count,
    WIDTHS: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one group's sum_j W_ij f_j packed_j; groups follow each other along the grid's columns."""
    group, column = 0, tl.program_id(1)
    first = 0
    for n in tl.static_range(len(WIDTHS)):
        here = tl.program_id(1) >= first
        group, column = tl.where(here, n, group), tl.where(here, tl.program_id(1) - first, column)
        first += ((WIDTHS[n] + 15) // 16 * 16 + BLOCK_D - 1) // BLOCK_D
    _width, padded, before_padded, _before = _place(group, WIDTHS)
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d, step = column * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    of_rows = weights + (group.to(tl.int64) * batch + row[:, None]) * key_count
    teachers = packed + (batch + key_count) * before_padded + tl.cast(batch, tl.int64) * padded + d[None, :]
    total = tl.zeros((BLOCK_B, BLOCK_D), SUM)
    for k0 in tl.range(0, key_count, BLOCK_K):
        key = k0 + step
        weight = tl.load(of_rows + key[None, :], mask=(row < batch)[:, None] & (key < key_count)[None, :], other=0.0)
        mask = (key < key_count)[:, None] & (d < padded)[None, :]
        values = tl.load(teachers + key[:, None].to(tl.int64) * padded, mask=mask, other=0.0)
        total = tl.dot(weight.to(PRODUCT), values.to(PRODUCT), total, input_precision=PRECISION, out_dtype=SUM)
    place = sums + batch * before_padded + row[:, None].to(tl.int64) * padded + d[None, :]
    tl.store(place, total, mask=(row < batch)[:, None] & (d < padded)[None, :])


@triton.jit
def finish_kernel(
    sums, packed, inverse_lengths, tangents, inverse_temperature, result, columns, batch, key_count, total_width,
    WIDTHS: tl.constexpr, GAIN: tl.constexpr, SUM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_B rows of one group, in its columns of the result; and of each column, which group's it is."""
    group, row = tl.program_id(1), tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    width, padded, before_padded, before = _place(group, WIDTHS)
    if tl.program_id(0) == 0:
        for d0 in tl.range(0, width, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            tl.store(columns + before + d, (d * 0 + group).to(tl.int64), mask=d < width)
    numbers = group.to(tl.int64) * (batch + key_count)
    rows.finish_rows(
        sums + batch * before_padded, packed + (batch + key_count) * before_padded, inverse_lengths + numbers,
        tangents + numbers, tl.load(inverse_temperature) / GAIN, result + before, row, row < batch, width, padded,
        total_width, SUM, BLOCK_D,
    )  # fmt: skip


def info_nce_foreach(
    students: list[Tensor],
    teachers: list[Tensor],
    temperature: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    positive_offset: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean loss of each pair; of each row's own loss the gradient of the row, all pairs side by side, and of the
    temperature; and the pair that each column of the gradient belongs to."""
    first, batch, keys, groups = students[0], len(students[0]), len(teachers[0]), len(students)
    widths = tuple(side.shape[1] for side in students)
    losses, temperature_grads = (first.new_empty(groups, batch, dtype=torch.float32) for _ in range(2))
    result = losses.new_empty(batch, sum(widths))
    columns = torch.empty(sum(widths), dtype=torch.int64, device=first.device)
    most = table(runtime.chip(first.device).capability)["group_products"]
    with runtime.on_device(first):
        way = _together if groups * batch * keys <= most else _in_turn
        pair = (temperature, student_ids, teacher_ids, positive_offset, normalize)
        way(students, teachers, *pair, losses, temperature_grads, result, columns)
        return losses.mean(1), result, temperature_grads, columns


def _in_turn(
    students, teachers, temperature, student_ids, teacher_ids, positive_offset, normalize,
    losses, temperature_grads, result, columns,
) -> None:  # fmt: skip
    """One pair after the other, each in the way that suits it."""
    widths = [side.shape[1] for side in students]
    ids = student_ids, teacher_ids, positive_offset, normalize
    targets = result.split(widths, dim=1), columns.split(widths)
    for n, (student, teacher, grad, column) in enumerate(zip(students, teachers, *targets, strict=True)):
        way, pair = packed(student, teacher, temperature, *ids)
        losses[n], _lse, sums, temperature_grads[n] = way.one_pass(pair)
        finish(pair, sums, False, None, grad)
        column.fill_(n)


def _together(
    students, teachers, temperature, student_ids, teacher_ids, positive_offset, normalize,
    losses, temperature_grads, result, columns,
) -> None:  # fmt: skip
    """All pairs in five launches."""
    students, teachers = (
        [side if side.stride(1) == 1 else side.contiguous() for side in sides] for sides in (students, teachers)
    )
    first, batch, keys, groups = students[0], len(students[0]), len(teachers[0]), len(students)
    widths = tuple(side.shape[1] for side in students)
    padded = sum(triton.cdiv(width, 16) * 16 for width in widths)
    numbers = losses.new_empty(3, groups, batch + keys)
    factors, inverse_lengths, tangents = numbers
    inverse_temperature, unused = losses.new_empty(1), losses.new_empty(2, groups, batch)
    packed_rows = first.new_empty((batch + keys) * padded)
    products, weights = losses.new_empty(SPLITS, groups, batch, keys), first.new_empty(groups, batch, keys)
    sums = losses.new_empty(batch * padded)
    ids = (numbers, numbers) if student_ids is None else (student_ids.contiguous(), teacher_ids.contiguous())
    gain = 2.0**15 if first.dtype == torch.float16 else 1.0
    product = runtime.raised(first.dtype)
    shared = {"WIDTHS": widths, "SUM": tl.float32}
    how = {"PRODUCT": runtime.in_triton(product), "PRECISION": runtime.precision(product, as_matmul=True)}

    def block(kernel: str) -> dict[str, int]:
        return tiles(kernel, str(first.element_size()), runtime.chip(first.device).capability)

    given, tile = rows.given_temperature(temperature, numbers), block("pack")
    pack_kernel[(triton.cdiv(batch, tile["BLOCK_B"]) + triton.cdiv(keys, tile["BLOCK_B"]), groups)](
        tuple(students), tuple(teachers), tuple(s.stride(0) for s in students), tuple(t.stride(0) for t in teachers),
        given, packed_rows, *numbers, inverse_temperature, batch, keys, NORMALIZE=normalize,
        BY_VALUE=isinstance(given, float), **shared, **tile,
    )  # fmt: skip
    tile = block("group_products")
    grid = triton.cdiv(batch, tile["BLOCK_B"]) * triton.cdiv(keys, tile["BLOCK_K"]), SPLITS, groups
    products_kernel[grid](packed_rows, products, batch, keys, **shared, **how, **tile)
    tile = cut(block("chunk_one_pass"), "BLOCK_K", keys)
    chunks.one_pass_kernel[(triton.cdiv(batch, tile["BLOCK_B"]), groups)](
        products, factors, inverse_temperature, *ids, losses, *unused, temperature_grads, weights,
        batch, keys, 0, batch, positive_offset, groups, HAS_IDS=student_ids is not None, GRAD=True, GAIN=gain,
        SPLITS=SPLITS, SUM=tl.float32, **tile,
    )  # fmt: skip
    tile = block("group_sums")
    column_tiles = sum(triton.cdiv(triton.cdiv(width, 16) * 16, tile["BLOCK_D"]) for width in widths)
    sums_kernel[(triton.cdiv(batch, tile["BLOCK_B"]), column_tiles)](
        weights, packed_rows, sums, batch, keys, **shared, **how, **tile
    )
    tile = block("finish")
    finish_kernel[(triton.cdiv(batch, tile["BLOCK_B"]), groups)](
        sums, packed_rows, inverse_lengths, tangents, inverse_temperature, result, columns, batch, keys, sum(widths),
        GAIN=gain, **shared, **tile,
    )  # fmt: skip
