"""Kernels on a chunk of rows whose products with all keys, (rows, K) float32, stay in L2.

The library multiplies before and after. In between, these kernels read each product once or twice and, if a gradient
is needed, store the weights W_ij of the keys in the dtype of the rows, times the factor of the row they multiply:

    one pass    W_ij = P_ij - [j positive of i], P = softmax over the keys of i; sum_j W_ij k_j is the gradient
    gradient    the same from known log-sum-exps, times upstream gradients; if symmetric, plus the columns' softmax

The positive is left out of the sums and so of their rounding: its weight is minus the sum of the others'.

Bytes per product: 4 read for the loss; 8 read and 2 written with a gradient. FLOPs: about 10, and one or two exp.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfcc_kernels.backends.triton import online_softmax, runtime
from lfcc_kernels.backends.triton.info_nce_rows import Pair, Upstream
from lfcc_kernels.backends.triton.tiles import clamp_block, table


@triton.jit
def _load_logits(
    products, factors, inverse_temperature, row, col, row_ids, key_ids, batch, key_count, first_row, rows,
    positive_offset, split, HAS_IDS: tl.constexpr, N_SPLIT: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """Logits of a tile, which are part of the softmax, which are positives, and the factors of the columns; `row`
    counts from the start of the chunk."""
    row_mask = row < rows
    mask = row_mask[:, None] & (col < key_count)[None, :]
    place = products + row[:, None].to(tl.int64) * key_count + col[None, :]
    row_factor = tl.load(factors + first_row + row, mask=row_mask, other=0.0) * inverse_temperature
    col_factor = tl.load(factors + batch + col, mask=col < key_count, other=0.0)
    product = tl.load(place, mask=mask, other=0.0).to(ACC_DTYPE)
    for n in tl.static_range(1, N_SPLIT):
        product += tl.load(place + n * split, mask=mask, other=0.0).to(ACC_DTYPE)
    logits = product * row_factor[:, None] * col_factor[None, :]
    positive = col[None, :] == (row + first_row + positive_offset)[:, None]
    included = mask
    if HAS_IDS:
        ids_of_rows = tl.load(row_ids + first_row + row, mask=row_mask, other=0)
        ids_of_cols = tl.load(key_ids + col, mask=col < key_count, other=0)
        included = mask & (positive | (ids_of_rows[:, None] != ids_of_cols[None, :]))
    return logits, included, positive & mask, col_factor


@triton.jit
def one_pass_kernel(
    products, factors, inverse_temperature, row_ids, key_ids, losses, row_lse, positive_logits, temperature_grad,
    weights, batch, key_count, first_row, rows, positive_offset, pairs,
    HAS_IDS: tl.constexpr, GRAD: tl.constexpr, LOSS_SCALE: tl.constexpr, N_SPLIT: tl.constexpr,
    ACC_DTYPE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Loss, log-sum-exp and positive logit of BLOCK_B rows; with GRAD also the temperature's gradient and
    LOSS_SCALE W_ij f_j.

    The second grid index is the pair; inputs and outputs of `pairs` pairs are contiguous. A product is the sum of
    N_SPLIT parts.
    """
    pair = tl.program_id(1).to(tl.int64)
    split = pairs * batch * key_count
    products, weights = products + pair * batch * key_count, weights + pair * batch * key_count
    factors += pair * (batch + key_count)
    losses, row_lse, positive_logits, temperature_grad = (
        losses + pair * batch, row_lse + pair * batch, positive_logits + pair * batch, temperature_grad + pair * batch,
    )  # fmt: skip
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inverse = tl.load(inverse_temperature)
    m_i = tl.full((BLOCK_B,), -float("inf"), ACC_DTYPE)
    l_i = tl.zeros((BLOCK_B,), ACC_DTYPE)
    dtau_i = tl.zeros((BLOCK_B,), ACC_DTYPE)
    positive_logit = tl.zeros((BLOCK_B,), ACC_DTYPE)
    for k0 in tl.range(0, key_count, BLOCK_K):
        col = k0 + tl.arange(0, BLOCK_K)
        logits, included, positive, _ = _load_logits(
            products, factors, inverse, row, col, row_ids, key_ids, batch, key_count, first_row, rows, positive_offset,
            split, HAS_IDS, N_SPLIT, ACC_DTYPE,
        )  # fmt: skip
        positive_logit += tl.sum(tl.where(positive, logits, 0.0), 1)
        negative = included & (positive == 0)
        m_i, l_i, p, alpha = online_softmax.update(logits, negative, m_i, l_i, 1)
        if GRAD:
            dtau_i = dtau_i * alpha + tl.sum(tl.where(negative, p * logits, 0.0), 1)

    m_negatives = m_i
    m_i = tl.maximum(m_i, positive_logit)
    alpha = tl.exp(m_negatives - m_i)
    l_i *= alpha
    loss, lse, denominator = online_softmax.add_positive(m_i, l_i, positive_logit)
    place, inside = first_row + row, row < rows
    tl.store(losses + place, loss, mask=inside)
    tl.store(row_lse + place, lse, mask=inside)
    tl.store(positive_logits + place, positive_logit, mask=inside)
    if GRAD:
        grad = online_softmax.temperature_grad(l_i, dtau_i * alpha, positive_logit, denominator, inverse)
        tl.store(temperature_grad + place, grad, mask=inside)
        for k0 in tl.range(0, key_count, BLOCK_K):
            col = k0 + tl.arange(0, BLOCK_K)
            logits, included, positive, col_factor = _load_logits(
                products, factors, inverse, row, col, row_ids, key_ids, batch, key_count, first_row, rows,
                positive_offset, split, HAS_IDS, N_SPLIT, ACC_DTYPE,
            )  # fmt: skip
            p = tl.where(included, tl.exp(logits - lse[:, None]), 0.0)
            weight = tl.where(positive, -(l_i / denominator)[:, None], p) * col_factor[None, :] * LOSS_SCALE
            target = weights + row[:, None].to(tl.int64) * key_count + col[None, :]
            tl.store(target, weight.to(weights.dtype.element_ty), mask=inside[:, None] & (col < key_count)[None, :])


@triton.jit
def columns_kernel(
    products, factors, inverse_temperature, row_ids, key_ids, col_m, col_l, batch, key_count, first_row, rows,
    positive_offset, HAS_IDS: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add this chunk's rows to the online softmax of BLOCK_K of the positives' columns."""
    student = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)  # whose positive the column is
    col = tl.where(student < batch, student + positive_offset, key_count)
    inverse = tl.load(inverse_temperature)
    m_i = tl.load(col_m + student, mask=student < batch, other=0.0)
    l_i = tl.load(col_l + student, mask=student < batch, other=0.0)
    for r0 in tl.range(0, rows, BLOCK_B):
        row = r0 + tl.arange(0, BLOCK_B)
        logits, included, _, _ = _load_logits(
            products, factors, inverse, row, col, row_ids, key_ids, batch, key_count, first_row, rows, positive_offset,
            0, HAS_IDS, 1, ACC_DTYPE,
        )  # fmt: skip
        m_i, l_i, _p, _alpha = online_softmax.update(logits, included, m_i, l_i, 0)
    tl.store(col_m + student, m_i, mask=student < batch)
    tl.store(col_l + student, l_i, mask=student < batch)


@triton.jit
def gradient_kernel(
    products, factors, inverse_temperature, row_ids, key_ids, grad, row_lse, col_lse, grad_absmax, dtau, weights,
    batch, key_count, first_row, rows, positive_offset,
    HAS_IDS: tl.constexpr, SYMMETRIC: tl.constexpr, OF_TEACHER: tl.constexpr, LOSS_SCALE: tl.constexpr,
    BY_ABSMAX: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LOSS_SCALE / grad_absmax W_ij f of BLOCK_B rows, with upstream gradients in W and f of the side that W
    multiplies, and the temperature's gradient per row."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < rows
    inverse = tl.load(inverse_temperature)
    grad_of_row = tl.load(grad + first_row + row, mask=inside, other=0.0).to(ACC_DTYPE)
    lse_of_row = tl.load(row_lse + first_row + row, mask=inside, other=0.0)
    row_factor = tl.load(factors + first_row + row, mask=inside, other=0.0)
    loss_scale = tl.full((), LOSS_SCALE, ACC_DTYPE)
    if BY_ABSMAX:
        loss_scale /= tl.load(grad_absmax)
    dtau_i = tl.zeros((BLOCK_B,), ACC_DTYPE)
    for k0 in tl.range(0, key_count, BLOCK_K):
        col = k0 + tl.arange(0, BLOCK_K)
        logits, included, positive, col_factor = _load_logits(
            products, factors, inverse, row, col, row_ids, key_ids, batch, key_count, first_row, rows, positive_offset,
            0, HAS_IDS, 1, ACC_DTYPE,
        )  # fmt: skip
        label = tl.where(positive, 1.0, 0.0).to(ACC_DTYPE)
        weight = online_softmax.logits_grad(logits, label, included, lse_of_row[:, None], grad_of_row[:, None])
        if SYMMETRIC:
            student = col - positive_offset  # whose positive the column is
            has_loss = (student >= 0) & (student < batch)
            grad_of_col = tl.load(grad + student, mask=has_loss, other=0.0).to(ACC_DTYPE)
            lse_of_col = tl.load(col_lse + student, mask=has_loss, other=0.0)
            mask = included & has_loss[None, :]
            of_cols = online_softmax.logits_grad(logits, label, mask, lse_of_col[None, :], grad_of_col[None, :])
            weight = 0.5 * (weight + of_cols)
        dtau_i += tl.sum(tl.where(included, weight * logits, 0.0), 1)
        weight *= loss_scale * (row_factor[:, None] if OF_TEACHER else col_factor[None, :])
        target = weights + row[:, None].to(tl.int64) * key_count + col[None, :]
        tl.store(target, weight.to(weights.dtype.element_ty), mask=inside[:, None] & (col < key_count)[None, :])
    tl.store(dtau + first_row + row, -dtau_i * inverse, mask=inside)


def forward(pair: Pair, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, log-sum-exps of the rows and, if symmetric, of the positives' columns."""
    losses, row_lse, positive_logits = (pair.new_stats(pair.batch) for _ in range(3))
    col_m, col_l = pair.new_stats(2, pair.batch if symmetric else 0)
    col_m.fill_(-torch.inf)
    col_l.zero_()
    block = pair.tiles("chunk_columns")
    for first, products, _ in _chunks(pair, with_weights=False):
        _softmax(pair, first, products, None, losses, row_lse, positive_logits, losses)
        if symmetric:
            columns_kernel[(triton.cdiv(pair.batch, block["BLOCK_K"]),)](
                products, pair.factors, pair.inverse_temperature, *pair.ids, col_m, col_l, pair.batch, pair.keys, first,
                len(products), pair.positive_offset, HAS_IDS=pair.has_ids,
                ACC_DTYPE=runtime.to_tl_dtype(pair.acc_dtype), **block,
            )  # fmt: skip
    if symmetric:
        losses = (losses + ((col_m - positive_logits) + col_l.log())) / 2
    return losses, row_lse, col_m + col_l.log()


def one_pass(pair: Pair) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and log-sum-exps of the rows, sum_j W_ij f_j packed_j, and each row's gradient of the temperature."""
    losses, row_lse, positive_logits, temperature_grad = (pair.new_stats(pair.batch) for _ in range(4))
    acc = pair.new_stats(*pair.student.shape)
    for first, products, weights in _chunks(pair, with_weights=True):
        _softmax(pair, first, products, weights, losses, row_lse, positive_logits, temperature_grad)
        _multiply(weights, pair.teacher, acc[first : first + len(weights)])
    return losses, row_lse, acc, temperature_grad


def gradient(pair: Pair, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """acc of one side's rows as `epilogue_kernel` reads it, and terms whose sum is the temperature's gradient."""
    of_teacher, absmax = upstream.of_teacher, upstream.grad_absmax
    dtau = pair.new_stats(pair.batch)
    acc = pair.new_stats(*(pair.teacher if of_teacher else pair.student).shape)
    block = clamp_block(pair.tiles("chunk_gradient"), "BLOCK_K", pair.keys)
    for first, products, weights in _chunks(pair, with_weights=True):
        gradient_kernel[(triton.cdiv(len(products), block["BLOCK_B"]),)](
            products, pair.factors, pair.inverse_temperature, *pair.ids, upstream.grad, upstream.row_lse,
            upstream.col_lse, upstream.grad if absmax is None else absmax, dtau, weights, pair.batch, pair.keys, first,
            len(products), pair.positive_offset, HAS_IDS=pair.has_ids, SYMMETRIC=upstream.symmetric,
            OF_TEACHER=of_teacher, LOSS_SCALE=pair.loss_scale, BY_ABSMAX=absmax is not None,
            ACC_DTYPE=runtime.to_tl_dtype(pair.acc_dtype), **block,
        )  # fmt: skip
        chunk = slice(first, first + len(weights))
        if of_teacher:
            _multiply(weights.t(), pair.student[chunk], acc, accumulate=first > 0)
        else:
            _multiply(weights, pair.teacher, acc[chunk])
    return acc, dtau


def _chunks(pair: Pair, with_weights: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First row, products (rows, K), and memory for as many weights if `with_weights`, chunk by chunk.

    All chunks use the same memory, so the products of a chunk stay in L2 until those of the next overwrite them.
    """
    limit = table(runtime.device_props(pair.factors.device).capability)["chunk_bytes"]
    size = min(pair.batch, max(16, limit // (pair.keys * pair.acc_dtype.itemsize) // 16 * 16))
    products = pair.new_stats(size, pair.keys)
    weights = pair.student.new_empty(size if with_weights else 0, pair.keys)
    for first in range(0, pair.batch, size):
        rows = pair.student[first : first + size]
        _multiply(rows, pair.teacher.t(), products[: len(rows)])
        yield first, products[: len(rows)], weights[: len(rows)]


def _softmax(pair: Pair, first: int, products: Tensor, weights: Tensor | None, *stats: Tensor) -> None:
    """Fill stats (losses, log-sum-exps, positive logits, temperature gradients) of a chunk, and `weights` if given."""
    block = clamp_block(pair.tiles("chunk_one_pass"), "BLOCK_K", pair.keys)
    one_pass_kernel[(triton.cdiv(len(products), block["BLOCK_B"]),)](
        products, pair.factors, pair.inverse_temperature, *pair.ids, *stats, products if weights is None else weights,
        pair.batch, pair.keys, first, len(products), pair.positive_offset, 1,
        HAS_IDS=pair.has_ids, GRAD=weights is not None, LOSS_SCALE=pair.loss_scale, N_SPLIT=1,
        ACC_DTYPE=runtime.to_tl_dtype(pair.acc_dtype), **block,
    )  # fmt: skip


def _multiply(left: Tensor, right: Tensor, result: Tensor, accumulate: bool = False) -> None:
    """result = left @ right, added to result if `accumulate`, in result's dtype without rounding to the inputs'."""
    if runtime.INTERPRET:  # torch supports a different output dtype on GPUs only
        left, right = left.to(result.dtype), right.to(result.dtype)
    if left.dtype == result.dtype:
        torch.addmm(result, left, right, out=result) if accumulate else torch.mm(left, right, out=result)
    elif accumulate:
        torch.addmm(result, left, right, out_dtype=result.dtype, out=result)
    else:
        torch.mm(left, right, out_dtype=result.dtype, out=result)
