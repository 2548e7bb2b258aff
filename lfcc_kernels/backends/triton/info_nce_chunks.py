"""Kernels over a chunk of rows whose products with all keys, (rows, K) float32, lie in the last cache.

The library does the products before and after; between them these read every product once or twice and write, where
a gradient is wanted, the weights W_ij of the keys in the products' type, times the factor of the row they multiply:

    one pass    W_ij = P_ij - [j positive of i], P = softmax over the keys of i; sum_j W_ij k_j is the gradient
    gradient    the same from known log-sum-exps, times upstream gradients, and for symmetric the columns' share

The positive is kept out of the sums and of rounding: its weight is minus the share of all others.

Bytes a product: 4 read for the loss, 8 read and 2 written with a gradient. FLOPs: about 10, and one or two exp.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfcc_kernels.backends.triton import runtime
from lfcc_kernels.backends.triton.info_nce_rows import Pair
from lfcc_kernels.backends.triton.tiles import cut, table


@triton.jit
def _tile(
    products, factors, inverse_temperature, row, col, row_ids, key_ids, batch, key_count, first_row, rows,
    positive_offset, split, HAS_IDS: tl.constexpr, SPLITS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Logits of a tile, which of them count, and which are positives; `row` counts from the start of the chunk."""
    of_chunk = row < rows
    inside = of_chunk[:, None] & (col < key_count)[None, :]
    place = products + row[:, None].to(tl.int64) * key_count + col[None, :]
    along_rows = tl.load(factors + first_row + row, mask=of_chunk, other=0.0) * inverse_temperature
    along_cols = tl.load(factors + batch + col, mask=col < key_count, other=0.0)
    product = tl.load(place, mask=inside, other=0.0).to(SUM)
    for n in tl.static_range(1, SPLITS):
        product += tl.load(place + n * split, mask=inside, other=0.0).to(SUM)
    logits = product * along_rows[:, None] * along_cols[None, :]
    positive = col[None, :] == (row + first_row + positive_offset)[:, None]
    kept = inside
    if HAS_IDS:
        of_rows = tl.load(row_ids + first_row + row, mask=of_chunk, other=0)
        of_keys = tl.load(key_ids + col, mask=col < key_count, other=0)
        kept = inside & (positive | (of_rows[:, None] != of_keys[None, :]))
    return logits, kept, positive & inside, along_cols


@triton.jit
def one_pass_kernel(
    products, factors, inverse_temperature, row_ids, key_ids, losses, row_lse, positives, temperature_grad, weights,
    batch, key_count, first_row, rows, positive_offset, groups,
    HAS_IDS: tl.constexpr, GRAD: tl.constexpr, GAIN: tl.constexpr, SPLITS: tl.constexpr, SUM: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Loss, log-sum-exp and positive logit of BLOCK_B rows; with GRAD the temperature's gradient and GAIN W f too.

    Of groups, whose numbers follow each other, one a second index of the grid; products are the sum of SPLITS parts.
    """
    group = tl.program_id(1).to(tl.int64)
    split = groups * batch * key_count
    products, weights = products + group * batch * key_count, weights + group * batch * key_count
    factors += group * (batch + key_count)
    losses, row_lse, positives, temperature_grad = (
        losses + group * batch, row_lse + group * batch, positives + group * batch, temperature_grad + group * batch,
    )  # fmt: skip
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    scale = tl.load(inverse_temperature)
    peak = tl.full((BLOCK_B,), -float("inf"), SUM)
    others = tl.zeros((BLOCK_B,), SUM)
    weighted = tl.zeros((BLOCK_B,), SUM)
    at_positive = tl.zeros((BLOCK_B,), SUM)
    for k0 in tl.range(0, key_count, BLOCK_K):
        col = k0 + tl.arange(0, BLOCK_K)
        logits, kept, positive, _ = _tile(
            products, factors, scale, row, col, row_ids, key_ids, batch, key_count, first_row, rows, positive_offset,
            split, HAS_IDS, SPLITS, SUM,
        )  # fmt: skip
        at_positive += tl.sum(tl.where(positive, logits, 0.0), 1)
        negative = kept & (positive == 0)
        highest = tl.maximum(peak, tl.max(tl.where(negative, logits, -float("inf")), 1))
        base = tl.where(highest == -float("inf"), 0.0, highest)
        share = tl.where(negative, tl.exp(logits - base[:, None]), 0.0)
        shrink = tl.exp(peak - base)
        others = others * shrink + tl.sum(share, 1)
        if GRAD:
            weighted = weighted * shrink + tl.sum(tl.where(negative, share * logits, 0.0), 1)
        peak = highest

    top = tl.maximum(peak, at_positive)
    shrink = tl.exp(peak - top)
    others *= shrink
    total = others + tl.exp(at_positive - top)
    lse = top + tl.log(total)
    place, inside = first_row + row, row < rows
    tl.store(losses + place, (top - at_positive) + tl.log(total), mask=inside)
    tl.store(row_lse + place, lse, mask=inside)
    tl.store(positives + place, at_positive, mask=inside)
    if GRAD:
        slope = (weighted * shrink - others * at_positive) / total
        tl.store(temperature_grad + place, -slope * scale, mask=inside)
        for k0 in tl.range(0, key_count, BLOCK_K):
            col = k0 + tl.arange(0, BLOCK_K)
            logits, kept, positive, along_cols = _tile(
                products, factors, scale, row, col, row_ids, key_ids, batch, key_count, first_row, rows,
                positive_offset, split, HAS_IDS, SPLITS, SUM,
            )  # fmt: skip
            share = tl.where(kept, tl.exp(logits - lse[:, None]), 0.0)
            weight = tl.where(positive, -(others / total)[:, None], share) * along_cols[None, :] * GAIN
            target = weights + row[:, None].to(tl.int64) * key_count + col[None, :]
            tl.store(target, weight.to(weights.dtype.element_ty), mask=inside[:, None] & (col < key_count)[None, :])


@triton.jit
def columns_kernel(
    products, factors, inverse_temperature, row_ids, key_ids, peaks, totals, batch, key_count, first_row, rows,
    positive_offset, HAS_IDS: tl.constexpr, SUM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Running maximum and sum of exponentials of BLOCK_K of the positives' columns, this chunk's rows added."""
    own = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    col = tl.where(own < batch, own + positive_offset, key_count)
    scale = tl.load(inverse_temperature)
    peak = tl.load(peaks + own, mask=own < batch, other=0.0)
    total = tl.load(totals + own, mask=own < batch, other=0.0)
    for r0 in tl.range(0, rows, BLOCK_B):
        row = r0 + tl.arange(0, BLOCK_B)
        logits, kept, _, _ = _tile(
            products, factors, scale, row, col, row_ids, key_ids, batch, key_count, first_row, rows, positive_offset,
            0, HAS_IDS, 1, SUM,
        )  # fmt: skip
        highest = tl.maximum(peak, tl.max(tl.where(kept, logits, -float("inf")), 0))
        base = tl.where(highest == -float("inf"), 0.0, highest)
        share = tl.where(kept, tl.exp(logits - base[None, :]), 0.0)
        total = total * tl.exp(peak - base) + tl.sum(share, 0)
        peak = highest
    tl.store(peaks + own, peak, mask=own < batch)
    tl.store(totals + own, total, mask=own < batch)


@triton.jit
def gradient_kernel(
    products, factors, inverse_temperature, row_ids, key_ids, grad, row_lse, col_lse, magnitude, slopes, weights,
    batch, key_count, first_row, rows, positive_offset,
    HAS_IDS: tl.constexpr, SYMMETRIC: tl.constexpr, OF_TEACHER: tl.constexpr, GAIN: tl.constexpr,
    RELATIVE: tl.constexpr, SUM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """GAIN / magnitude W f of BLOCK_B rows, upstream gradients in W, f of the side that W multiplies; and of each row
    the temperature's gradient."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < rows
    scale = tl.load(inverse_temperature)
    upstream = tl.load(grad + first_row + row, mask=inside, other=0.0).to(SUM)
    along_rows = tl.load(row_lse + first_row + row, mask=inside, other=0.0)
    of_row = tl.load(factors + first_row + row, mask=inside, other=0.0)
    gain = tl.full((), GAIN, SUM)
    if RELATIVE:
        gain /= tl.load(magnitude)
    slope = tl.zeros((BLOCK_B,), SUM)
    for k0 in tl.range(0, key_count, BLOCK_K):
        col = k0 + tl.arange(0, BLOCK_K)
        logits, kept, positive, along_cols = _tile(
            products, factors, scale, row, col, row_ids, key_ids, batch, key_count, first_row, rows, positive_offset,
            0, HAS_IDS, 1, SUM,
        )  # fmt: skip
        label = tl.where(positive, 1.0, 0.0).to(SUM)
        weight = upstream[:, None] * (tl.where(kept, tl.exp(logits - along_rows[:, None]), 0.0) - label)
        if SYMMETRIC:
            own = col - positive_offset
            has_own = (own >= 0) & (own < batch)
            of_col = tl.load(grad + own, mask=has_own, other=0.0).to(SUM)
            lse = tl.load(col_lse + own, mask=has_own, other=0.0)
            share = tl.where(kept & has_own[None, :], tl.exp(logits - lse[None, :]), 0.0)
            weight = 0.5 * (weight + of_col[None, :] * (share - label))
        slope += tl.sum(tl.where(kept, weight * logits, 0.0), 1)
        weight *= gain * (of_row[:, None] if OF_TEACHER else along_cols[None, :])
        target = weights + row[:, None].to(tl.int64) * key_count + col[None, :]
        tl.store(target, weight.to(weights.dtype.element_ty), mask=inside[:, None] & (col < key_count)[None, :])
    tl.store(slopes + first_row + row, -slope * scale, mask=inside)


def statistics(pair: Pair, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and log-sum-exps of the rows, and of the positives' columns where symmetric."""
    losses, row_lse, positives = (pair.numbers(pair.batch) for _ in range(3))
    peaks, totals = pair.numbers(2, pair.batch if symmetric else 0)
    peaks.fill_(-torch.inf)
    totals.zero_()
    for first, products, _ in _chunks(pair, with_weights=False):
        _softmax(pair, first, products, None, losses, row_lse, positives, losses)
        if symmetric:
            _columns(pair, first, products, peaks, totals)
    if symmetric:
        losses = (losses + ((peaks - positives) + totals.log())) / 2
    return losses, row_lse, peaks + totals.log()


def one_pass(pair: Pair) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and log-sum-exps of the rows, sum_j W_ij f_j packed_j, and each row's gradient of the temperature."""
    losses, row_lse, positives, temperature_grad = (pair.numbers(pair.batch) for _ in range(4))
    sums = pair.numbers(*pair.student.shape)
    for first, products, weights in _chunks(pair, with_weights=True):
        _softmax(pair, first, products, weights, losses, row_lse, positives, temperature_grad)
        _multiply(weights, pair.teacher, sums[first : first + len(weights)])
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
    slopes = pair.numbers(pair.batch)
    sums = pair.numbers(*(pair.teacher if of_teacher else pair.student).shape)
    block = cut(pair.tiles("chunk_gradient"), "BLOCK_K", pair.keys)
    for first, products, weights in _chunks(pair, with_weights=True):
        gradient_kernel[(triton.cdiv(len(products), block["BLOCK_B"]),)](
            products, pair.factors, pair.inverse_temperature, *pair.ids, grad, row_lse, col_lse,
            grad if magnitude is None else magnitude, slopes, weights, pair.batch, pair.keys, first, len(products),
            pair.positive_offset, HAS_IDS=pair.has_ids, SYMMETRIC=symmetric, OF_TEACHER=of_teacher, GAIN=pair.gain,
            RELATIVE=magnitude is not None, SUM=runtime.in_triton(pair.total), **block,
        )  # fmt: skip
        here = slice(first, first + len(weights))
        if of_teacher:
            _multiply(weights.t(), pair.student[here], sums, accumulate=first > 0)
        else:
            _multiply(weights, pair.teacher, sums[here])
    return sums, slopes


def _chunks(pair: Pair, with_weights: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First row, products (rows, K), and a place for as many weights, where asked for.

    The products of one chunk stay in the last cache until those of the next take their place.
    """
    limit = table(runtime.chip(pair.factors.device).capability)["chunk_bytes"]
    size = min(pair.batch, max(16, limit // (pair.keys * pair.total.itemsize) // 16 * 16))
    products = pair.numbers(size, pair.keys)
    weights = pair.student.new_empty(size if with_weights else 0, pair.keys)
    for first in range(0, pair.batch, size):
        here = pair.student[first : first + size]
        _multiply(here, pair.teacher.t(), products[: len(here)])
        yield first, products[: len(here)], weights[: len(here)]


def _softmax(
    pair: Pair,
    first: int,
    products: Tensor,
    weights: Tensor | None,
    losses: Tensor,
    row_lse: Tensor,
    positives: Tensor,
    temperature_grad: Tensor,
) -> None:
    block = cut(pair.tiles("chunk_one_pass"), "BLOCK_K", pair.keys)
    one_pass_kernel[(triton.cdiv(len(products), block["BLOCK_B"]),)](
        products, pair.factors, pair.inverse_temperature, *pair.ids, losses, row_lse, positives, temperature_grad,
        products if weights is None else weights, pair.batch, pair.keys, first, len(products), pair.positive_offset, 1,
        HAS_IDS=pair.has_ids, GRAD=weights is not None, GAIN=pair.gain, SPLITS=1,
        SUM=runtime.in_triton(pair.total), **block,
    )  # fmt: skip


def _columns(pair: Pair, first: int, products: Tensor, peaks: Tensor, totals: Tensor) -> None:
    block = pair.tiles("chunk_columns")
    columns_kernel[(triton.cdiv(pair.batch, block["BLOCK_K"]),)](
        products, pair.factors, pair.inverse_temperature, *pair.ids, peaks, totals, pair.batch, pair.keys, first,
        len(products), pair.positive_offset, HAS_IDS=pair.has_ids, SUM=runtime.in_triton(pair.total), **block,
    )  # fmt: skip


def _multiply(left: Tensor, right: Tensor, result: Tensor, accumulate: bool = False) -> None:
    """result = left @ right, added to what is there if `accumulate`, in result's type straight from the sums."""
    if runtime.INTERPRET:  # torch has products into another type on GPUs alone
        left, right = left.to(result.dtype), right.to(result.dtype)
    if left.dtype == result.dtype:
        torch.addmm(result, left, right, out=result) if accumulate else torch.mm(left, right, out=result)
    elif accumulate:
        torch.addmm(result, left, right, out_dtype=result.dtype, out=result)
    else:
        torch.mm(left, right, out_dtype=result.dtype, out=result)
