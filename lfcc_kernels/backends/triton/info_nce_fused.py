"""Fused tiles for narrow rows: products, softmax and gradient without storing logits, as FlashAttention does.

One program holds BLOCK_B rows of one side (Q) and loops over a split of the other side's rows (K), BLOCK_K at a time:

    one pass    online softmax of the logits, and acc = sum_j p_ij k_j, rescaled with it; 4 B K D FLOPs
                (2 B K D without a gradient)
    gradient    weights W_ij from known log-sum-exps, acc = sum_j W_ij k_j; 4 B K D FLOPs per side

If the rows are too few to fill the GPU, several programs share a block of rows and `merge_kernel` combines their
splits. The positive is left out of acc: its weight, minus the sum of the others', is added exactly.

Bytes: K is read from L2 once per block of Q rows, which is BLOCK_B D FLOPs per byte of 16-bit rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from lfcc_kernels.backends.triton import online_softmax, runtime
from lfcc_kernels.backends.triton.info_nce_rows import Pair, Upstream


@triton.jit
def _load_q(
    q, q_factors, q_ids, inverse_temperature, q_count, HAS_IDS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr
):
    """The rows of Q that this program owns: their numbers, mask and values, factor / temperature, and ids."""
    row, d = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), tl.arange(0, WIDTH)
    inside = row < q_count
    values = tl.load(q + row[:, None].to(tl.int64) * WIDTH + d[None, :], mask=inside[:, None], other=0.0)
    scale = tl.load(q_factors + row, mask=inside, other=0.0) * inverse_temperature
    ids = row
    if HAS_IDS:
        ids = tl.load(q_ids + row, mask=inside, other=0)
    return row, inside, values, scale, ids


@triton.jit
def _load_k(
    block, q, row, q_inside, scale, row_ids, k, k_factors, k_ids, k_count, shift,
    HAS_IDS: tl.constexpr, WIDTH: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ACC_DTYPE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of K: column numbers, values and factors, and its logits, which of them are positives, and which are
    part of the softmax."""
    col, d = block * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, WIDTH)
    inside = col < k_count
    values = tl.load(k + col[:, None].to(tl.int64) * WIDTH + d[None, :], mask=inside[:, None], other=0.0)
    factor = tl.load(k_factors + col, mask=inside, other=0.0)
    qk = tl.dot(q.to(DOT_DTYPE), tl.trans(values.to(DOT_DTYPE)), input_precision=PRECISION, out_dtype=ACC_DTYPE)
    logits = qk * scale[:, None] * factor[None, :]
    positive = col[None, :] == (row + shift)[:, None]
    included = q_inside[:, None] & inside[None, :]
    if HAS_IDS:
        col_ids = tl.load(k_ids + col, mask=inside, other=0)
        included = included & (positive | (row_ids[:, None] != col_ids[None, :]))
    return col, values, factor, logits, positive, included


@triton.jit
def one_pass_kernel(
    q, k, q_factors, k_factors, inverse_temperature, q_ids, k_ids,
    m_parts, l_parts, dtau_parts, positive_parts, acc_parts, q_count, k_count, shift,
    HAS_IDS: tl.constexpr, GRAD: tl.constexpr, LOSS_SCALE: tl.constexpr, WIDTH: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Softmax statistics and acc of BLOCK_B rows over a split of their negatives; the positive of row r of Q is row
    r + shift of K."""
    row, inside, queries, scale, row_ids = _load_q(
        q, q_factors, q_ids, tl.load(inverse_temperature), q_count, HAS_IDS, WIDTH, BLOCK_B
    )
    m_i = tl.full((BLOCK_B,), -float("inf"), ACC_DTYPE)
    l_i, dtau_i = tl.zeros((BLOCK_B,), ACC_DTYPE), tl.zeros((BLOCK_B,), ACC_DTYPE)
    positive_logit = tl.zeros((BLOCK_B,), ACC_DTYPE)
    acc = tl.zeros((BLOCK_B, WIDTH), ACC_DTYPE)
    for block in tl.range(tl.program_id(1), tl.cdiv(k_count, BLOCK_K), tl.num_programs(1)):
        _col, keys, factor, logits, positive, included = _load_k(
            block, queries, row, inside, scale, row_ids, k, k_factors, k_ids, k_count, shift,
            HAS_IDS, WIDTH, DOT_DTYPE, PRECISION, ACC_DTYPE, BLOCK_K,
        )  # fmt: skip
        positive_logit += tl.sum(tl.where(positive, logits, 0.0), 1)
        negative = included & (positive == 0)
        m_i, l_i, p, alpha = online_softmax.update(logits, negative, m_i, l_i, 1)
        if GRAD:
            dtau_i = dtau_i * alpha + tl.sum(tl.where(negative, p * logits, 0.0), 1)
            weight = (p * factor[None, :] * LOSS_SCALE).to(k.dtype.element_ty).to(DOT_DTYPE)
            acc = acc * alpha[:, None]
            acc = tl.dot(weight, keys.to(DOT_DTYPE), acc, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    place = tl.program_id(1) * q_count + row
    tl.store(m_parts + place, m_i, mask=inside)
    tl.store(l_parts + place, l_i, mask=inside)
    tl.store(dtau_parts + place, dtau_i, mask=inside)
    tl.store(positive_parts + place, positive_logit, mask=inside)
    if GRAD:
        target = acc_parts + place[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(target, acc, mask=inside[:, None])


@triton.jit
def merge_kernel(
    m_parts, l_parts, dtau_parts, positive_parts, acc_parts, k, k_factors, inverse_temperature,
    losses, lse, temperature_grad, acc, rows, shift,
    GRAD: tl.constexpr, LOSS_SCALE: tl.constexpr, N_SPLIT: tl.constexpr, WIDTH: tl.constexpr,
    ACC_DTYPE: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Combine the splits of BLOCK_B rows: losses, log-sum-exps and, with GRAD, the temperature's gradient and
    LOSS_SCALE sum_j W_ij f_j packed_j."""
    row, d = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), tl.arange(0, WIDTH)
    inside = row < rows
    positive_logit = tl.zeros((BLOCK_B,), ACC_DTYPE)
    for n in tl.static_range(N_SPLIT):
        positive_logit += tl.load(positive_parts + n * rows + row, mask=inside, other=0.0)
    m_i = positive_logit
    for n in tl.static_range(N_SPLIT):
        m_i = tl.maximum(m_i, tl.load(m_parts + n * rows + row, mask=inside, other=0.0))
    l_i, dtau_i = tl.zeros((BLOCK_B,), ACC_DTYPE), tl.zeros((BLOCK_B,), ACC_DTYPE)
    for n in tl.static_range(N_SPLIT):
        alpha = tl.exp(tl.load(m_parts + n * rows + row, mask=inside, other=0.0) - m_i)
        l_i += alpha * tl.load(l_parts + n * rows + row, mask=inside, other=0.0)
        dtau_i += alpha * tl.load(dtau_parts + n * rows + row, mask=inside, other=0.0)
    loss_i, lse_i, denominator = online_softmax.add_positive(m_i, l_i, positive_logit)
    tl.store(losses + row, loss_i, mask=inside)
    tl.store(lse + row, lse_i, mask=inside)
    if GRAD:
        grad = online_softmax.temperature_grad(l_i, dtau_i, positive_logit, denominator, tl.load(inverse_temperature))
        tl.store(temperature_grad + row, grad, mask=inside)
        weight = -l_i / denominator * tl.load(k_factors + row + shift, mask=inside, other=0.0) * LOSS_SCALE
        place = k + (row + shift)[:, None].to(tl.int64) * WIDTH + d[None, :]
        value = weight[:, None] * tl.load(place, mask=inside[:, None], other=0.0).to(ACC_DTYPE)
        for n in tl.static_range(N_SPLIT):
            alpha = tl.exp(tl.load(m_parts + n * rows + row, mask=inside, other=0.0) - m_i) / denominator
            place = acc_parts + (n * rows + row)[:, None].to(tl.int64) * WIDTH + d[None, :]
            value += alpha[:, None] * tl.load(place, mask=inside[:, None], other=0.0)
        tl.store(acc + row[:, None].to(tl.int64) * WIDTH + d[None, :], value, mask=inside[:, None])


@triton.jit
def gradient_kernel(
    q, k, q_factors, k_factors, inverse_temperature, q_ids, k_ids, grad, row_lse, col_lse, grad_absmax,
    dtau, acc_parts, q_count, k_count, batch, shift, positive_offset,
    HAS_IDS: tl.constexpr, SYMMETRIC: tl.constexpr, OF_TEACHER: tl.constexpr, LOSS_SCALE: tl.constexpr,
    BY_ABSMAX: tl.constexpr, WIDTH: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ACC_DTYPE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LOSS_SCALE / grad_absmax sum_j W_ij f_j packed_j over a split of K, and the temperature's gradient per row.

    Q is the side whose gradient is computed, the teacher with OF_TEACHER. A row or column without a student, hence
    without a loss, contributes nothing.
    """
    inverse = tl.load(inverse_temperature)
    row, inside, queries, scale, row_ids = _load_q(q, q_factors, q_ids, inverse, q_count, HAS_IDS, WIDTH, BLOCK_B)
    loss_scale = tl.full((), LOSS_SCALE, ACC_DTYPE)
    if BY_ABSMAX:
        loss_scale /= tl.load(grad_absmax)
    row_student = row - positive_offset if OF_TEACHER else row
    row_has_loss = inside & (row_student >= 0) & (row_student < batch)
    if SYMMETRIC or not OF_TEACHER:
        grad_of_row = tl.load(grad + row_student, mask=row_has_loss, other=0.0)
        lse_of_row = tl.load((col_lse if OF_TEACHER else row_lse) + row_student, mask=row_has_loss, other=0.0)
    dtau_i = tl.zeros((BLOCK_B,), ACC_DTYPE)
    acc = tl.zeros((BLOCK_B, WIDTH), ACC_DTYPE)
    for block in tl.range(tl.program_id(1), tl.cdiv(k_count, BLOCK_K), tl.num_programs(1)):
        col, keys, factor, logits, positive, included = _load_k(
            block, queries, row, inside, scale, row_ids, k, k_factors, k_ids, k_count, shift,
            HAS_IDS, WIDTH, DOT_DTYPE, PRECISION, ACC_DTYPE, BLOCK_K,
        )  # fmt: skip
        label = tl.where(positive, 1.0, 0.0).to(ACC_DTYPE)
        weight = tl.zeros((BLOCK_B, BLOCK_K), ACC_DTYPE)
        if SYMMETRIC or not OF_TEACHER:
            mask = included & row_has_loss[:, None]
            weight += online_softmax.logits_grad(logits, label, mask, lse_of_row[:, None], grad_of_row[:, None])
        if SYMMETRIC or OF_TEACHER:
            col_student = col if OF_TEACHER else col - positive_offset
            col_has_loss = (col < k_count) & (col_student >= 0) & (col_student < batch)
            grad_of_col = tl.load(grad + col_student, mask=col_has_loss, other=0.0)
            lse_of_col = tl.load((row_lse if OF_TEACHER else col_lse) + col_student, mask=col_has_loss, other=0.0)
            mask = included & col_has_loss[None, :]
            weight += online_softmax.logits_grad(logits, label, mask, lse_of_col[None, :], grad_of_col[None, :])
        if SYMMETRIC:
            weight *= 0.5
        weight = tl.where(included, weight, 0.0)
        dtau_i += tl.sum(tl.where(included, weight * logits, 0.0), 1)
        weight = (weight * factor[None, :] * loss_scale).to(k.dtype.element_ty).to(DOT_DTYPE)
        acc = tl.dot(weight, keys.to(DOT_DTYPE), acc, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    place = tl.program_id(1) * q_count + row
    tl.store(dtau + place, -dtau_i * inverse, mask=inside)
    target = acc_parts + place[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(target, acc, mask=inside[:, None])


def forward(pair: Pair, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, log-sum-exps of the rows and, if symmetric, of the positives' columns."""
    losses, row_lse, _ = _one_pass(pair, of_columns=False)
    if not symmetric:
        return losses, row_lse, row_lse.new_empty(0)
    col_losses, col_lse, _ = _one_pass(pair, of_columns=True)
    return (losses + col_losses) / 2, row_lse, col_lse


def one_pass(pair: Pair) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and log-sum-exps of the rows, sum_j W_ij f_j packed_j, and each row's gradient of the temperature."""
    acc = pair.new_stats(*pair.student.shape)
    losses, row_lse, temperature_grad = _one_pass(pair, of_columns=False, acc=acc)
    return losses, row_lse, acc, temperature_grad


def gradient(pair: Pair, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """acc of one side's rows as `epilogue_kernel` reads it, and terms whose sum is the temperature's gradient."""
    of_teacher, absmax = upstream.of_teacher, upstream.grad_absmax
    q, k = (pair.teacher, pair.student) if of_teacher else (pair.student, pair.teacher)
    q_factors, k_factors = reversed(pair.side_factors) if of_teacher else pair.side_factors
    q_ids, k_ids = reversed(pair.ids) if of_teacher else pair.ids
    block, splits = _splits(pair, "fused_gradient", len(q), len(k))
    acc_parts, dtau = pair.new_stats(splits, *q.shape), pair.new_stats(splits, len(q))
    gradient_kernel[(triton.cdiv(len(q), block["BLOCK_B"]), splits)](
        q, k, q_factors, k_factors, pair.inverse_temperature, q_ids, k_ids, upstream.grad, upstream.row_lse,
        upstream.col_lse, upstream.grad if absmax is None else absmax, dtau, acc_parts, len(q), len(k), pair.batch,
        -pair.positive_offset if of_teacher else pair.positive_offset, pair.positive_offset,
        HAS_IDS=pair.has_ids, SYMMETRIC=upstream.symmetric, OF_TEACHER=of_teacher, LOSS_SCALE=pair.loss_scale,
        BY_ABSMAX=absmax is not None, **_dot_options(pair), **block,
    )  # fmt: skip
    return acc_parts[0] if splits == 1 else acc_parts.sum(0), dtau


def _one_pass(pair: Pair, of_columns: bool, acc: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, log-sum-exps and temperature gradients of the rows against all keys, or of the positives' columns
    against all rows. Fills `acc`; without it the temperature gradients are not computed."""
    q, k, shift = pair.student, pair.teacher, pair.positive_offset
    (q_factors, k_factors), (q_ids, k_ids) = pair.side_factors, pair.ids
    if of_columns:
        columns = slice(shift, shift + pair.batch)
        q, k, shift = pair.teacher[columns], pair.student, 0
        q_factors, k_factors = k_factors[columns], q_factors
        q_ids, k_ids = (k_ids[columns], q_ids) if pair.has_ids else pair.ids
    block, splits = _splits(pair, "fused_one_pass", len(q), len(k))
    losses, lse, temperature_grad = (pair.new_stats(pair.batch) for _ in range(3))
    stats = pair.new_stats(4, splits, len(q))
    acc_parts = losses if acc is None else pair.new_stats(splits, *q.shape)
    flags = {"GRAD": acc is not None, "LOSS_SCALE": pair.loss_scale}
    one_pass_kernel[(triton.cdiv(len(q), block["BLOCK_B"]), splits)](
        q, k, q_factors, k_factors, pair.inverse_temperature, q_ids, k_ids, *stats, acc_parts, len(q), len(k), shift,
        HAS_IDS=pair.has_ids, **flags, **_dot_options(pair), **block,
    )  # fmt: skip
    merge = pair.tiles("fused_merge")
    merge_kernel[(triton.cdiv(len(q), merge["BLOCK_B"]),)](
        *stats, acc_parts, k, k_factors, pair.inverse_temperature, losses, lse, temperature_grad,
        losses if acc is None else acc, len(q), shift, N_SPLIT=splits, WIDTH=q.shape[1],
        ACC_DTYPE=runtime.to_tl_dtype(pair.acc_dtype), **flags, **merge,
    )  # fmt: skip
    return losses, lse, temperature_grad


def _splits(pair: Pair, kernel: str, q_count: int, k_count: int) -> tuple[dict[str, int], int]:
    """Tiles, and the number of splits of K that gives every multiprocessor work."""
    block = pair.tiles(kernel)
    programs = 2 * runtime.device_props(pair.student.device).multiprocessors
    wanted = programs // triton.cdiv(q_count, block["BLOCK_B"])
    return block, max(1, min(wanted, 8, triton.cdiv(k_count, block["BLOCK_K"])))


def _dot_options(pair: Pair) -> dict:
    """Constexprs of products of packed rows."""
    dot_dtype = runtime.compute_dtype(pair.student.dtype)
    return {
        "WIDTH": pair.student.shape[1],
        "DOT_DTYPE": runtime.to_tl_dtype(dot_dtype),
        "PRECISION": runtime.precision(dot_dtype, as_matmul=True),
        "ACC_DTYPE": runtime.to_tl_dtype(pair.acc_dtype),
    }
