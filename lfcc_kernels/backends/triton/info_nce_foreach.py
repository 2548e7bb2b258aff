"""Many small pairs in five launches, for a whole LFCC loss (stages x scales), where launches cost more than the work.

All pairs have the same B rows and K keys; widths differ. Each launch covers all pairs:

    pack        rows of both sides, as in `info_nce_rows.py`
    products    (SPLITS, pairs, B, K); split-K, the width is divided into SPLITS parts
    softmax     `one_pass_kernel` of `info_nce_chunks.py`: losses and weights
    acc         sums of weighted keys, one program per tile of rows and columns
    epilogue    gradients of the rows

The products of all pairs are stored at once, so this is for small ones; the table has the limit.
FLOPs: 4 B K D per pair. Bytes: 4 (SPLITS + 1) + 2 per product, and both sides read twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfcc_kernels.backends.triton import info_nce_chunks as chunks
from lfcc_kernels.backends.triton import info_nce_rows as rows
from lfcc_kernels.backends.triton import runtime
from lfcc_kernels.backends.triton.info_nce import algorithm
from lfcc_kernels.backends.triton.tiles import clamp_block, table, tiles

SPLITS = 8  # of the width: a row of the finest scale has thousands of values


@triton.jit
def _layout(pair, WIDTHS: tl.constexpr):
    """Width of a pair's rows, padded width, and the columns of the pairs before it, padded and not."""
    width, padded, before_padded, before = 0, 0, 0, 0
    sum_padded, total = 0, 0
    for n in tl.static_range(len(WIDTHS)):
        width = tl.where(pair == n, WIDTHS[n], width)
        padded = tl.where(pair == n, (WIDTHS[n] + 15) // 16 * 16, padded)
        before_padded = tl.where(pair == n, sum_padded, before_padded)
        before = tl.where(pair == n, total, before)
        sum_padded, total = sum_padded + (WIDTHS[n] + 15) // 16 * 16, total + WIDTHS[n]
    return width, padded, before_padded.to(tl.int64), before


@triton.jit
def pack_kernel(
    students, teachers, student_strides, teacher_strides, temperature, packed, factors, inverse_norms, projections,
    inverse_temperature, batch, key_count,
    WIDTHS: tl.constexpr, NORMALIZE: tl.constexpr, BY_VALUE: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program packs BLOCK_B rows of a pair; the grid covers the student's rows, then the teacher's."""
    pair, blocks = tl.program_id(1), tl.cdiv(batch, BLOCK_B)
    if (tl.program_id(0) == 0) & (pair == 0):
        rows.store_inverse(temperature, inverse_temperature, BY_VALUE, ACC_DTYPE)
    of_teacher = tl.program_id(0) >= blocks
    source, stride = students[0], student_strides[0]
    for n in tl.static_range(len(WIDTHS)):
        source = tl.where(pair == n, tl.where(of_teacher, teachers[n], students[n]), source)
        stride = tl.where(pair == n, tl.where(of_teacher, teacher_strides[n], student_strides[n]), stride)
    width, padded, before_padded, _ = _layout(pair, WIDTHS)
    side = tl.where(of_teacher, batch, 0)
    row = (tl.program_id(0) - tl.where(of_teacher, blocks, 0)) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < tl.where(of_teacher, key_count, batch)
    target = packed + (batch + key_count) * before_padded + side.to(tl.int64) * padded
    factor, inverse_norm, projection = rows.pack_rows(
        source, target, row, inside, width, padded, stride.to(tl.int64), 1, NORMALIZE, ACC_DTYPE, BLOCK_D
    )
    place = pair.to(tl.int64) * (batch + key_count) + side + row
    tl.store(factors + place, factor, mask=inside)
    tl.store(inverse_norms + place, inverse_norm, mask=inside)
    tl.store(projections + place, projection, mask=inside)


@triton.jit
def products_kernel(
    packed, products, batch, key_count,
    WIDTHS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of a pair's products over one split of the width."""
    blocks = tl.cdiv(batch, BLOCK_B)
    pair, split = tl.program_id(2), tl.program_id(1)
    row = (tl.program_id(0) % blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    col = (tl.program_id(0) // blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    step = tl.arange(0, BLOCK_D)
    _width, padded, before_padded, _before = _layout(pair, WIDTHS)
    students = packed + (batch + key_count) * before_padded + row[:, None].to(tl.int64) * padded
    teachers = packed + (batch + key_count) * before_padded + (batch + col)[:, None].to(tl.int64) * padded
    acc = tl.zeros((BLOCK_B, BLOCK_K), ACC_DTYPE)
    for d0 in tl.range(split * BLOCK_D, padded, tl.num_programs(1) * BLOCK_D):
        mask = (d0 + step < padded)[None, :]
        q = tl.load(students + (d0 + step)[None, :], mask=mask & (row < batch)[:, None], other=0.0)
        k = tl.load(teachers + (d0 + step)[None, :], mask=mask & (col < key_count)[:, None], other=0.0)
        acc = tl.dot(q.to(DOT_DTYPE), tl.trans(k.to(DOT_DTYPE)), acc, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    part = (split * tl.num_programs(2) + pair).to(tl.int64) * batch * key_count
    place = products + part + row[:, None].to(tl.int64) * key_count + col[None, :]
    tl.store(place, acc, mask=(row < batch)[:, None] & (col < key_count)[None, :])


@triton.jit
def acc_kernel(
    weights, packed, accs, batch, key_count,
    WIDTHS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of a pair's sum_j W_ij f_j packed_j; the second grid index runs over the columns of
    all pairs."""
    pair, column = 0, tl.program_id(1)
    first = 0
    for n in tl.static_range(len(WIDTHS)):
        reached = tl.program_id(1) >= first
        pair, column = tl.where(reached, n, pair), tl.where(reached, tl.program_id(1) - first, column)
        first += ((WIDTHS[n] + 15) // 16 * 16 + BLOCK_D - 1) // BLOCK_D
    _width, padded, before_padded, _before = _layout(pair, WIDTHS)
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d, step = column * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    row_weights = weights + (pair.to(tl.int64) * batch + row[:, None]) * key_count
    teachers = packed + (batch + key_count) * before_padded + tl.cast(batch, tl.int64) * padded + d[None, :]
    acc = tl.zeros((BLOCK_B, BLOCK_D), ACC_DTYPE)
    for k0 in tl.range(0, key_count, BLOCK_K):
        key = k0 + step
        mask = (row < batch)[:, None] & (key < key_count)[None, :]
        weight = tl.load(row_weights + key[None, :], mask=mask, other=0.0)
        mask = (key < key_count)[:, None] & (d < padded)[None, :]
        k = tl.load(teachers + key[:, None].to(tl.int64) * padded, mask=mask, other=0.0)
        acc = tl.dot(weight.to(DOT_DTYPE), k.to(DOT_DTYPE), acc, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    place = accs + batch * before_padded + row[:, None].to(tl.int64) * padded + d[None, :]
    tl.store(place, acc, mask=(row < batch)[:, None] & (d < padded)[None, :])


@triton.jit
def epilogue_kernel(
    accs, packed, inverse_norms, projections, inverse_temperature, result, columns, batch, key_count, total_width,
    WIDTHS: tl.constexpr, LOSS_SCALE: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_B rows of a pair, in its columns of the result, and the pair's number in its part of
    `columns`."""
    pair, row = tl.program_id(1), tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    width, padded, before_padded, before = _layout(pair, WIDTHS)
    if tl.program_id(0) == 0:
        for d0 in tl.range(0, width, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            tl.store(columns + before + d, (d * 0 + pair).to(tl.int64), mask=d < width)
    stats = pair.to(tl.int64) * (batch + key_count)
    rows.epilogue_rows(
        accs + batch * before_padded, packed + (batch + key_count) * before_padded, inverse_norms + stats,
        projections + stats, tl.load(inverse_temperature) / LOSS_SCALE, result + before, row, row < batch, width,
        padded, total_width, ACC_DTYPE, BLOCK_D,
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
    """Mean loss of each pair; the gradient of each row's own loss for the row, pairs side by side, and for the
    temperature; and the pair that each column of that gradient belongs to."""
    first, batch, keys, pairs = students[0], len(students[0]), len(teachers[0]), len(students)
    widths = tuple(side.shape[1] for side in students)
    losses, temperature_grads = (first.new_empty(pairs, batch, dtype=torch.float32) for _ in range(2))
    result = losses.new_empty(batch, sum(widths))
    columns = torch.empty(sum(widths), dtype=torch.int64, device=first.device)
    limit = table(runtime.device_props(first.device).capability)["foreach_products"]
    with runtime.on_device(first):
        run = _batched if pairs * batch * keys <= limit else _sequential
        shared = (temperature, student_ids, teacher_ids, positive_offset, normalize)
        run(students, teachers, *shared, losses, temperature_grads, result, columns)
        return losses.mean(1), result, temperature_grads, columns


def _sequential(students, teachers, temperature, *rest) -> None:
    """One pair after the other, each by the algorithm that suits it; arguments as `_batched`."""
    *options, losses, temperature_grads, result, columns = rest
    widths = [side.shape[1] for side in students]
    targets = result.split(widths, dim=1), columns.split(widths)
    for n, (student, teacher, grad, column) in enumerate(zip(students, teachers, *targets, strict=True)):
        pair = rows.pack(student, teacher, temperature, *options)
        losses[n], _lse, acc, temperature_grads[n] = algorithm(pair).one_pass(pair)
        rows.epilogue(pair, acc, False, None, grad)
        column.fill_(n)


def _batched(
    students, teachers, temperature, student_ids, teacher_ids, positive_offset, normalize,
    losses, temperature_grads, result, columns,
) -> None:  # fmt: skip
    """All pairs in five launches."""
    students, teachers = (
        [side if side.stride(1) == 1 else side.contiguous() for side in sides] for sides in (students, teachers)
    )
    first, batch, keys, pairs = students[0], len(students[0]), len(teachers[0]), len(students)
    widths = tuple(side.shape[1] for side in students)
    padded = sum(triton.cdiv(width, 16) * 16 for width in widths)
    stats = losses.new_empty(3, pairs, batch + keys)
    factors, inverse_norms, projections = stats
    inverse_temperature, unused = losses.new_empty(1), losses.new_empty(2, pairs, batch)
    packed = first.new_empty((batch + keys) * padded)
    products, weights = losses.new_empty(SPLITS, pairs, batch, keys), first.new_empty(pairs, batch, keys)
    accs = losses.new_empty(batch * padded)
    ids = (stats, stats) if student_ids is None else (student_ids.contiguous(), teacher_ids.contiguous())
    loss_scale = rows.loss_scale(first.dtype)
    dot_dtype = runtime.compute_dtype(first.dtype)
    shared = {"WIDTHS": widths, "ACC_DTYPE": tl.float32}
    dot = {"DOT_DTYPE": runtime.to_tl_dtype(dot_dtype), "PRECISION": runtime.precision(dot_dtype, as_matmul=True)}

    def block(kernel: str) -> dict[str, int]:
        return tiles(kernel, str(first.element_size()), runtime.device_props(first.device).capability)

    given, tile = rows.kernel_temperature(temperature, stats), block("pack")
    pack_kernel[(triton.cdiv(batch, tile["BLOCK_B"]) + triton.cdiv(keys, tile["BLOCK_B"]), pairs)](
        tuple(students), tuple(teachers), tuple(s.stride(0) for s in students), tuple(t.stride(0) for t in teachers),
        given, packed, *stats, inverse_temperature, batch, keys, NORMALIZE=normalize,
        BY_VALUE=isinstance(given, float), **shared, **tile,
    )  # fmt: skip
    tile = block("foreach_products")
    grid = triton.cdiv(batch, tile["BLOCK_B"]) * triton.cdiv(keys, tile["BLOCK_K"]), SPLITS, pairs
    products_kernel[grid](packed, products, batch, keys, **shared, **dot, **tile)
    tile = clamp_block(block("chunk_one_pass"), "BLOCK_K", keys)
    chunks.one_pass_kernel[(triton.cdiv(batch, tile["BLOCK_B"]), pairs)](
        products, factors, inverse_temperature, *ids, losses, *unused, temperature_grads, weights,
        batch, keys, 0, batch, positive_offset, pairs, HAS_IDS=student_ids is not None, GRAD=True,
        LOSS_SCALE=loss_scale, N_SPLIT=SPLITS, ACC_DTYPE=tl.float32, **tile,
    )  # fmt: skip
    tile = block("foreach_acc")
    column_tiles = sum(triton.cdiv(triton.cdiv(width, 16) * 16, tile["BLOCK_D"]) for width in widths)
    acc_kernel[(triton.cdiv(batch, tile["BLOCK_B"]), column_tiles)](
        weights, packed, accs, batch, keys, **shared, **dot, **tile
    )
    tile = block("epilogue")
    epilogue_kernel[(triton.cdiv(batch, tile["BLOCK_B"]), pairs)](
        accs, packed, inverse_norms, projections, inverse_temperature, result, columns, batch, keys, sum(widths),
        LOSS_SCALE=loss_scale, **shared, **tile,
    )  # fmt: skip
