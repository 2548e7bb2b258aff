"""Fused tiles for narrow rows: products, softmax and gradient without a product in memory, as flash attention does.

One program holds BLOCK_B rows of one side and walks over a share of the other side's, BLOCK_K at a time:

    one pass    running maximum m, sum of exp(A - m) and sum of exp(A - m) k_j, rescaled when m grows; 4 B K D FLOPs
                (2 B K D without gradient)
    gradient    W_ij from known log-sum-exps, sum_j W_ij k_j; 4 B K D FLOPs a side

Where rows are too few to fill the chip, several programs share a block of rows and `merge_kernel` puts their parts
together. The positive is kept out of the product: its weight, minus the share of all others, is added exactly.

Bytes: the other side's rows from L2 once a block of rows, so BLOCK_B D FLOPs a byte at two bytes.
"""

import triton
import triton.language as tl
from torch import Tensor

from lfcc_kernels.backends.triton import runtime
from lfcc_kernels.backends.triton.info_nce_rows import Pair


@triton.jit
def one_pass_kernel(
    own, other, own_factors, other_factors, inverse_temperature, own_ids, other_ids,
    peaks, others, weighted, positives, parts, own_count, other_count, shift,
    HAS_IDS: tl.constexpr, GRAD: tl.constexpr, GAIN: tl.constexpr, WIDTH: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Statistics over a share of the negatives of BLOCK_B rows, the positive of row r being other row r + shift."""
    row, d = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), tl.arange(0, WIDTH)
    inside = row < own_count
    queries = tl.load(own + row[:, None].to(tl.int64) * WIDTH + d[None, :], mask=inside[:, None], other=0.0)
    scale = tl.load(own_factors + row, mask=inside, other=0.0) * tl.load(inverse_temperature)
    if HAS_IDS:
        of_rows = tl.load(own_ids + row, mask=inside, other=0)
    highest = tl.full((BLOCK_B,), -float("inf"), SUM)
    total, slope, at_positive = tl.zeros((BLOCK_B,), SUM), tl.zeros((BLOCK_B,), SUM), tl.zeros((BLOCK_B,), SUM)
    sums = tl.zeros((BLOCK_B, WIDTH), SUM)
    for block in tl.range(tl.program_id(1), tl.cdiv(other_count, BLOCK_K), tl.num_programs(1)):
        col = block * BLOCK_K + tl.arange(0, BLOCK_K)
        there = col < other_count
        keys = tl.load(other + col[:, None].to(tl.int64) * WIDTH + d[None, :], mask=there[:, None], other=0.0)
        factor = tl.load(other_factors + col, mask=there, other=0.0)
        products = tl.dot(queries.to(PRODUCT), tl.trans(keys.to(PRODUCT)), input_precision=PRECISION, out_dtype=SUM)
        logits = products * scale[:, None] * factor[None, :]
        positive = col[None, :] == (row + shift)[:, None]
        at_positive += tl.sum(tl.where(positive, logits, 0.0), 1)
        negative = there[None, :] & (positive == 0)
        if HAS_IDS:
            negative = negative & (of_rows[:, None] != tl.load(other_ids + col, mask=there, other=0)[None, :])
        peak = tl.maximum(highest, tl.max(tl.where(negative, logits, -float("inf")), 1))
        base = tl.where(peak == -float("inf"), 0.0, peak)
        share = tl.where(negative, tl.exp(logits - base[:, None]), 0.0)
        shrink = tl.exp(highest - base)
        total = total * shrink + tl.sum(share, 1)
        if GRAD:
            slope = slope * shrink + tl.sum(tl.where(negative, share * logits, 0.0), 1)
            weight = (share * factor[None, :] * GAIN).to(other.dtype.element_ty).to(PRODUCT)
            sums = tl.dot(weight, keys.to(PRODUCT), sums * shrink[:, None], input_precision=PRECISION, out_dtype=SUM)
        highest = peak
    place = tl.program_id(1) * own_count + row
    tl.store(peaks + place, highest, mask=inside)
    tl.store(others + place, total, mask=inside)
    tl.store(weighted + place, slope, mask=inside)
    tl.store(positives + place, at_positive, mask=inside)
    if GRAD:
        target = parts + place[:, None].to(tl.int64) * WIDTH + d[None, :]
        tl.store(target, sums, mask=inside[:, None])


@triton.jit
def merge_kernel(
    peaks, others, weighted, positives, parts, other, other_factors, inverse_temperature,
    losses, row_lse, positive_logits, temperature_grad, sums, rows, shift,
    GRAD: tl.constexpr, GAIN: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, SUM: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Losses, log-sum-exps and, with GRAD, the temperature's gradient and GAIN sum_j W_ij f_j packed_j of rows."""
    row, d = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), tl.arange(0, WIDTH)
    inside = row < rows
    at_positive = tl.zeros((BLOCK_B,), SUM)
    for n in tl.static_range(SPLITS):
        at_positive += tl.load(positives + n * rows + row, mask=inside, other=0.0)
    top = at_positive
    for n in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(peaks + n * rows + row, mask=inside, other=0.0))
    negatives, slope = tl.zeros((BLOCK_B,), SUM), tl.zeros((BLOCK_B,), SUM)
    for n in tl.static_range(SPLITS):
        shrink = tl.exp(tl.load(peaks + n * rows + row, mask=inside, other=0.0) - top)
        negatives += shrink * tl.load(others + n * rows + row, mask=inside, other=0.0)
        slope += shrink * tl.load(weighted + n * rows + row, mask=inside, other=0.0)
    total = negatives + tl.exp(at_positive - top)
    tl.store(losses + row, (top - at_positive) + tl.log(total), mask=inside)
    tl.store(row_lse + row, top + tl.log(total), mask=inside)
    tl.store(positive_logits + row, at_positive, mask=inside)
    if GRAD:
        gradient = (slope - negatives * at_positive) / total
        tl.store(temperature_grad + row, -gradient * tl.load(inverse_temperature), mask=inside)
        of_positive = -negatives / total * tl.load(other_factors + row + shift, mask=inside, other=0.0) * GAIN
        place = other + (row + shift)[:, None].to(tl.int64) * WIDTH + d[None, :]
        value = of_positive[:, None] * tl.load(place, mask=inside[:, None], other=0.0).to(SUM)
        for n in tl.static_range(SPLITS):
            shrink = tl.exp(tl.load(peaks + n * rows + row, mask=inside, other=0.0) - top) / total
            place = parts + (n * rows + row)[:, None].to(tl.int64) * WIDTH + d[None, :]
            value += shrink[:, None] * tl.load(place, mask=inside[:, None], other=0.0)
        tl.store(sums + row[:, None].to(tl.int64) * WIDTH + d[None, :], value, mask=inside[:, None])


@triton.jit
def gradient_kernel(
    own, other, own_factors, other_factors, inverse_temperature, own_ids, other_ids, grad, row_lse, col_lse, magnitude,
    slopes, parts, own_count, other_count, batch, shift, positive_offset,
    HAS_IDS: tl.constexpr, SYMMETRIC: tl.constexpr, OF_TEACHER: tl.constexpr, GAIN: tl.constexpr,
    RELATIVE: tl.constexpr, WIDTH: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """GAIN / magnitude sum_j W_ij f_j packed_j over a share of the other side, and the temperature's gradient."""
    row, d = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), tl.arange(0, WIDTH)
    inside = row < own_count
    queries = tl.load(own + row[:, None].to(tl.int64) * WIDTH + d[None, :], mask=inside[:, None], other=0.0)
    inverse = tl.load(inverse_temperature)
    scale = tl.load(own_factors + row, mask=inside, other=0.0) * inverse
    if HAS_IDS:
        of_rows = tl.load(own_ids + row, mask=inside, other=0)
    gain = tl.full((), GAIN, SUM)
    if RELATIVE:
        gain /= tl.load(magnitude)
    own_student = row - positive_offset if OF_TEACHER else row
    own_has = inside & (own_student >= 0) & (own_student < batch)
    if SYMMETRIC or not OF_TEACHER:
        own_grad = tl.load(grad + own_student, mask=own_has, other=0.0)
        own_lse = tl.load((col_lse if OF_TEACHER else row_lse) + own_student, mask=own_has, other=0.0)
    slope = tl.zeros((BLOCK_B,), SUM)
    sums = tl.zeros((BLOCK_B, WIDTH), SUM)
    for block in tl.range(tl.program_id(1), tl.cdiv(other_count, BLOCK_K), tl.num_programs(1)):
        col = block * BLOCK_K + tl.arange(0, BLOCK_K)
        there = col < other_count
        keys = tl.load(other + col[:, None].to(tl.int64) * WIDTH + d[None, :], mask=there[:, None], other=0.0)
        factor = tl.load(other_factors + col, mask=there, other=0.0)
        products = tl.dot(queries.to(PRODUCT), tl.trans(keys.to(PRODUCT)), input_precision=PRECISION, out_dtype=SUM)
        logits = products * scale[:, None] * factor[None, :]
        positive = col[None, :] == (row + shift)[:, None]
        label = tl.where(positive, 1.0, 0.0).to(SUM)
        kept = inside[:, None] & there[None, :]
        if HAS_IDS:
            of_cols = tl.load(other_ids + col, mask=there, other=0)
            kept = kept & (positive | (of_rows[:, None] != of_cols[None, :]))
        weight = tl.zeros((BLOCK_B, BLOCK_K), SUM)
        if SYMMETRIC or not OF_TEACHER:
            share = tl.where(kept & own_has[:, None], tl.exp(logits - own_lse[:, None]), 0.0)
            weight += own_grad[:, None] * (share - label)
        if SYMMETRIC or OF_TEACHER:
            other_student = col if OF_TEACHER else col - positive_offset
            other_has = there & (other_student >= 0) & (other_student < batch)
            other_grad = tl.load(grad + other_student, mask=other_has, other=0.0)
            other_lse = tl.load((row_lse if OF_TEACHER else col_lse) + other_student, mask=other_has, other=0.0)
            share = tl.where(kept & other_has[None, :], tl.exp(logits - other_lse[None, :]), 0.0)
            weight += other_grad[None, :] * (share - label)
        if SYMMETRIC:
            weight *= 0.5
        weight = tl.where(kept, weight, 0.0)
        slope += tl.sum(tl.where(kept, weight * logits, 0.0), 1)
        weight = (weight * factor[None, :] * gain).to(other.dtype.element_ty).to(PRODUCT)
        sums = tl.dot(weight, keys.to(PRODUCT), sums, input_precision=PRECISION, out_dtype=SUM)
    place = tl.program_id(1) * own_count + row
    tl.store(slopes + place, -slope * inverse, mask=inside)
    tl.store(parts + place[:, None].to(tl.int64) * WIDTH + d[None, :], sums, mask=inside[:, None])


def statistics(pair: Pair, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and log-sum-exps of the rows, and of the positives' columns where symmetric."""
    losses, row_lse, positives, unused = (pair.numbers(pair.batch) for _ in range(4))
    _one_pass(pair, False, None, losses, row_lse, positives, unused)
    if not symmetric:
        return losses, row_lse, row_lse.new_empty(0)
    along_columns, col_lse = pair.numbers(pair.batch), pair.numbers(pair.batch)
    _one_pass(pair, True, None, along_columns, col_lse, positives, unused)
    return (losses + along_columns) / 2, row_lse, col_lse


def one_pass(pair: Pair) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and log-sum-exps of the rows, sum_j W_ij f_j packed_j, and each row's gradient of the temperature."""
    losses, row_lse, positives, temperature_grad = (pair.numbers(pair.batch) for _ in range(4))
    sums = pair.numbers(*pair.student.shape)
    _one_pass(pair, False, sums, losses, row_lse, positives, temperature_grad)
    return losses, row_lse, sums, temperature_grad


def gradient(
    pair: Pair,
    grad: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    magnitude: Tensor | None,
    symmetric: bool,
    of_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """Sums of one side's rows as `finish_kernel` takes them, and the temperature's gradient in parts."""
    own, other = (pair.teacher, pair.student) if of_teacher else (pair.student, pair.teacher)
    own_factors, other_factors = reversed(pair.side_factors) if of_teacher else pair.side_factors
    own_ids, other_ids = reversed(pair.ids) if of_teacher else pair.ids
    block, splits = _shares(pair, "fused_gradient", len(own), len(other))
    parts, slopes = pair.numbers(splits, *own.shape), pair.numbers(splits, len(own))
    gradient_kernel[(triton.cdiv(len(own), block["BLOCK_B"]), splits)](
        own, other, own_factors, other_factors, pair.inverse_temperature, own_ids, other_ids, grad, row_lse, col_lse,
        grad if magnitude is None else magnitude, slopes, parts, len(own), len(other), pair.batch,
        -pair.positive_offset if of_teacher else pair.positive_offset, pair.positive_offset,
        HAS_IDS=pair.has_ids, SYMMETRIC=symmetric, OF_TEACHER=of_teacher, GAIN=pair.gain,
        RELATIVE=magnitude is not None, **_products(pair), **block,
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0), slopes


def _one_pass(
    pair: Pair,
    of_columns: bool,
    sums: Tensor | None,
    losses: Tensor,
    lse: Tensor,
    positives: Tensor,
    temperature_grad: Tensor,
) -> None:
    """Of the rows against all keys, or of the positives' columns against all rows; with a gradient where `sums` is."""
    own, other, shift = pair.student, pair.teacher, pair.positive_offset
    (own_factors, other_factors), (own_ids, other_ids) = pair.side_factors, pair.ids
    if of_columns:
        columns = slice(shift, shift + pair.batch)
        own, other, shift = pair.teacher[columns], pair.student, 0
        own_factors, other_factors = other_factors[columns], own_factors
        own_ids, other_ids = (other_ids[columns], own_ids) if pair.has_ids else pair.ids
    block, splits = _shares(pair, "fused_one_pass", len(own), len(other))
    statistics = pair.numbers(4, splits, len(own))
    parts = losses if sums is None else pair.numbers(splits, *own.shape)
    flags = {"GRAD": sums is not None, "GAIN": pair.gain}
    one_pass_kernel[(triton.cdiv(len(own), block["BLOCK_B"]), splits)](
        own, other, own_factors, other_factors, pair.inverse_temperature, own_ids, other_ids, *statistics, parts,
        len(own), len(other), shift, HAS_IDS=pair.has_ids, **flags, **_products(pair), **block,
    )  # fmt: skip
    merge = pair.tiles("fused_merge")
    merge_kernel[(triton.cdiv(len(own), merge["BLOCK_B"]),)](
        *statistics, parts, other, other_factors, pair.inverse_temperature, losses, lse, positives, temperature_grad,
        losses if sums is None else sums, len(own), shift, SPLITS=splits, WIDTH=own.shape[1],
        SUM=runtime.in_triton(pair.total), **flags, **merge,
    )  # fmt: skip


def _shares(pair: Pair, kernel: str, own: int, other: int) -> tuple[dict[str, int], int]:
    """Tiles, and into how many shares the other side is cut so that every multiprocessor has work."""
    block = pair.tiles(kernel)
    programs = 2 * runtime.chip(pair.student.device).multiprocessors
    wanted = programs // triton.cdiv(own, block["BLOCK_B"])
    return block, max(1, min(wanted, 8, triton.cdiv(other, block["BLOCK_K"])))


def _products(pair: Pair) -> dict:
    """How tl.dot multiplies packed rows."""
    product = runtime.raised(pair.student.dtype)
    return {
        "WIDTH": pair.student.shape[1],
        "PRODUCT": runtime.in_triton(product),
        "PRECISION": runtime.precision(product, as_matmul=True),
        "SUM": runtime.in_triton(pair.total),
    }
