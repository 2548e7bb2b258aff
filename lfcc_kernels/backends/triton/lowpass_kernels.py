"""The low-pass pyramid as skinny matrix products that read the map once for all scales.

With k = (h, w) a pixel, n = (s, i, j) a cell and M[k, n] = R_s[i, h] K_s[j, w]:

    forward       Y[b, n, c]  = sum_k X[b, c, k] M[k, n]        reads X once
    input grad    dX[b, c, k] = sum_n dY[b, n, c] M[k, n]       writes dX once: a gather, no atomics
    filter grad   dM[n, k]    = sum_bc dY[b, n, c] X[b, c, k]   reads X once more; dR and dK follow from dM

M is small (H W x 32) and stays in L2. It is one or two matrices of the products' dtype whose sum is the exact weight,
so tensor cores lose nothing. The average stores windows of ones and divides by the window's area at the end, which
leaves constant maps exact.

Tiles are (channels of an image) x (pixels). Strides are arbitrary; along pixels (NCHW) or channels (NHWC, tokens),
whichever is contiguous, accesses are 16 bytes wide. 16-bit NCHW maps whose size is not a multiple of 16 bytes, such as
7 x 7 and 14 x 14, are accessed as one contiguous run over the tile's channels and reordered in shared memory.

Bytes: X + Y forward, dX + dY backward, and M from L2 once per tile of channels, 64 / (2 BLOCK_C) of X's at 16 bits.
FLOPs: 64 per element of X and split of M, which tensor cores compute in a fraction of the time that the bytes take.
"""

import triton
import triton.language as tl


@triton.jit
def _cells(cell, height, width, SCALES: tl.constexpr):
    """Per cell: its rows in the stacked filters, and the bounds of its window, which is empty past the last cell."""
    row_filter, col_filter = cell * 0, cell * 0
    top, bottom, left, right = cell * 0, cell * 0, cell * 0, cell * 0
    first, filters = 0, 0
    for n in tl.static_range(len(SCALES)):
        in_scale = (cell >= first) & (cell < first + SCALES[n] * SCALES[n])
        i, j = (cell - first) // SCALES[n], (cell - first) % SCALES[n]
        row_filter = tl.where(in_scale, filters + i, row_filter)
        col_filter = tl.where(in_scale, filters + j, col_filter)
        top = tl.where(in_scale, i * height // SCALES[n], top)
        bottom = tl.where(in_scale, ((i + 1) * height + SCALES[n] - 1) // SCALES[n], bottom)
        left = tl.where(in_scale, j * width // SCALES[n], left)
        right = tl.where(in_scale, ((j + 1) * width + SCALES[n] - 1) // SCALES[n], right)
        first, filters = first + SCALES[n] * SCALES[n], filters + SCALES[n]
    return row_filter, col_filter, top, bottom, left, right


@triton.jit
def _areas(top, bottom, left, right, ACC_DTYPE: tl.constexpr):
    """Pixels in each window, 1 past the last cell."""
    return tl.maximum((bottom - top) * (right - left), 1).to(ACC_DTYPE)


@triton.jit
def _divide(numerator, denominator):
    """Rounded to nearest; Triton's own float32 division has an error of up to two ulp."""
    return numerator / denominator if numerator.dtype == tl.float64 else tl.div_rn(numerator, denominator)


@triton.jit
def _offsets(k, stride_h, stride_w, width, FLAT: tl.constexpr, INT64: tl.constexpr):
    """Offsets of pixels in a channel; FLAT if rows follow each other without a gap, INT64 if they exceed 32 bits."""
    k = k.to(tl.int64) if INT64 else k
    return k * stride_w if FLAT else (k // width) * stride_h + (k % width) * stride_w


@triton.jit
def _divisible(
    size, channels, stride_b, stride_c, stride_h, stride_w, CONTIG_DIM: tl.constexpr, DIVISIBLE_BY: tl.constexpr
):
    """The same numbers, rewritten to tell the compiler that DIVISIBLE_BY divides them, which widens accesses along the
    contiguous dimension CONTIG_DIM. Hints on arguments are lost when a function is inlined, products are not."""
    stride_b = stride_b // DIVISIBLE_BY * DIVISIBLE_BY
    if CONTIG_DIM == "pixels":
        size, stride_c = size // DIVISIBLE_BY * DIVISIBLE_BY, stride_c // DIVISIBLE_BY * DIVISIBLE_BY
    if CONTIG_DIM == "channels":
        channels = channels // DIVISIBLE_BY * DIVISIBLE_BY
        stride_h, stride_w = stride_h // DIVISIBLE_BY * DIVISIBLE_BY, stride_w // DIVISIBLE_BY * DIVISIBLE_BY
    return size, channels, stride_b, stride_c, stride_h, stride_w


@triton.jit
def _load_run(first, SPAN: tl.constexpr, RUN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tile of BLOCK_C contiguous maps of SPAN pixels each, starting at `first`. Values past the pixels of a map are
    not zero."""
    run = tl.arange(0, RUN)
    values = tl.load(first + run, mask=run < BLOCK_C * SPAN, other=0.0)
    place = tl.arange(0, BLOCK_C * BLOCK_K)
    source = (place // BLOCK_K) * SPAN + tl.minimum(place % BLOCK_K, SPAN - 1)
    return tl.reshape(tl.gather(values, source, 0), (BLOCK_C, BLOCK_K))


@triton.jit
def _store_run(first, tile, SPAN: tl.constexpr, RUN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Store the tile as BLOCK_C contiguous maps of SPAN pixels each, starting at `first`."""
    run = tl.arange(0, RUN)
    source = tl.minimum(run // SPAN, BLOCK_C - 1) * BLOCK_K + run % SPAN
    values = tl.gather(tl.reshape(tile, (BLOCK_C * BLOCK_K,)), source, 0)
    tl.store(first + run, values, mask=run < BLOCK_C * SPAN)


@triton.jit
def weights_kernel(
    row_filters, col_filters, weights, height, width,
    SCALES: tl.constexpr, N: tl.constexpr, N_SPLIT: tl.constexpr, FILTERED: tl.constexpr, MEAN: tl.constexpr,
    ACC_DTYPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """M as N_SPLIT matrices (H * W, N) that sum to it; for the average windows of ones, divided by the area if MEAN."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    cell = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = k < height * width
    row_filter, col_filter, top, bottom, left, right = _cells(cell, height, width, SCALES)
    h, w = (k // width)[:, None], (k % width)[:, None]
    if FILTERED:
        mask = inside[:, None] & (bottom > top)[None, :]
        row_weight = tl.load(row_filters + row_filter[None, :] * height + h, mask=mask, other=0.0)
        col_weight = tl.load(col_filters + col_filter[None, :] * width + w, mask=mask, other=0.0)
        value = row_weight * col_weight
    else:
        covered = (h >= top[None, :]) & (h < bottom[None, :]) & (w >= left[None, :]) & (w < right[None, :])
        value = tl.where(covered, 1.0, 0.0).to(ACC_DTYPE)
        if MEAN:
            value = _divide(value, _areas(top, bottom, left, right, ACC_DTYPE)[None, :])
    for n in tl.static_range(N_SPLIT):
        part = value.to(weights.dtype.element_ty)
        place = n * height * width * N + k[:, None] * N + cell[None, :]
        tl.store(weights + place, part, mask=inside[:, None])
        value -= part.to(value.dtype)


@triton.jit
def forward_kernel(
    x, weights, y, channels, height, width, stride_b, stride_c, stride_h, stride_w,
    SCALES: tl.constexpr, CELLS: tl.constexpr, N: tl.constexpr, N_SPLIT: tl.constexpr, AVERAGE: tl.constexpr,
    FLAT: tl.constexpr, INT64: tl.constexpr, CONTIG_DIM: tl.constexpr, DIVISIBLE_BY: tl.constexpr, SPAN: tl.constexpr,
    RUN: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of one image, all its pixels, BLOCK_N cells, which is all cells of a few scales."""
    COMPENSATED: tl.constexpr = x.dtype.element_ty.primitive_bitwidth >= 32
    size, channels, stride_b, stride_c, stride_h, stride_w = _divisible(
        height * width, channels, stride_b, stride_c, stride_h, stride_w, CONTIG_DIM, DIVISIBLE_BY
    )
    blocks_c = tl.cdiv(channels, BLOCK_C)
    image = (tl.program_id(0) // blocks_c).to(tl.int64)
    c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    cell, step = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    maps = x + image * stride_b + c[:, None].to(tl.int64) * stride_c
    first = x + image * stride_b + (tl.program_id(0) % blocks_c).to(tl.int64) * BLOCK_C * SPAN
    acc = tl.zeros((BLOCK_C, BLOCK_N), ACC_DTYPE)
    lost = tl.zeros((BLOCK_C, BLOCK_N), ACC_DTYPE)
    for k0 in tl.range(0, size, BLOCK_K):
        k = k0 + step
        if CONTIG_DIM == "run":
            tile = _load_run(first, SPAN, RUN, BLOCK_C, BLOCK_K)
        else:
            mask = (c < channels)[:, None] & (k < size)[None, :]
            tile = tl.load(maps + _offsets(k, stride_h, stride_w, width, FLAT, INT64)[None, :], mask=mask, other=0.0)
        # Results of 32 bits and more show the rounding of a sum of thousands: compensated summation (Kahan).
        part = tl.zeros((BLOCK_C, BLOCK_N), ACC_DTYPE) if COMPENSATED else acc
        for n in tl.static_range(N_SPLIT):
            place = weights + n * size * N + k[:, None] * N + cell[None, :]
            weight = tl.load(place, mask=(k < size)[:, None], other=0.0)
            part = tl.dot(tile.to(DOT_DTYPE), weight, part, input_precision=PRECISION, out_dtype=ACC_DTYPE)
        if COMPENSATED:
            part -= lost
            total = acc + part
            lost = (total - acc) - part
            acc = total
        else:
            acc = part

    if AVERAGE:
        # NaN or infinity times the zero weight of a window that does not cover it is NaN: sum such maps by windows.
        # In small steps, so that this rare branch does not take registers from the common one.
        if tl.max(tl.where(tl.abs(acc) < float("inf"), 0, 1)) > 0:
            for n in tl.range(tl.program_id(1) * BLOCK_N, tl.minimum(CELLS, (tl.program_id(1) + 1) * BLOCK_N)):
                column = tl.zeros((BLOCK_C,), ACC_DTYPE)
                for k0 in tl.range(0, size, 16):
                    k = k0 + tl.arange(0, 16)
                    mask = (c < channels)[:, None] & (k < size)[None, :]
                    offset = _offsets(k, stride_h, stride_w, width, FLAT, INT64)[None, :]
                    part = tl.load(maps + offset, mask=mask, other=0.0).to(ACC_DTYPE)
                    weight = tl.load(weights + k * N + n, mask=k < size, other=0.0)
                    column += tl.sum(tl.where(weight[None, :] != 0, part, 0.0), 1)
                acc = tl.where((cell == n)[None, :], column[:, None], acc)
        _row, _col, top, bottom, left, right = _cells(cell, height, width, SCALES)
        acc = _divide(acc, _areas(top, bottom, left, right, ACC_DTYPE)[None, :])

    place = y + image * CELLS * channels + cell[None, :] * channels + c[:, None]
    tl.store(place, acc.to(y.dtype.element_ty), mask=(c < channels)[:, None] & (cell < CELLS)[None, :])


@triton.jit
def input_grad_kernel(
    grad, weights, grad_x, channels, height, width, stride_b, stride_c, stride_h, stride_w, steps,
    CELLS: tl.constexpr, N: tl.constexpr, N_SPLIT: tl.constexpr, FLAT: tl.constexpr, INT64: tl.constexpr,
    CONTIG_DIM: tl.constexpr, DIVISIBLE_BY: tl.constexpr, SPAN: tl.constexpr, RUN: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of one image and `steps` blocks of pixels; dY is read once if N is one BLOCK_N."""
    size, channels, stride_b, stride_c, stride_h, stride_w = _divisible(
        height * width, channels, stride_b, stride_c, stride_h, stride_w, CONTIG_DIM, DIVISIBLE_BY
    )
    blocks_c = tl.cdiv(channels, BLOCK_C)
    image = (tl.program_id(0) // blocks_c).to(tl.int64)
    c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    cell = tl.arange(0, BLOCK_N)
    place = grad + image * CELLS * channels + cell[None, :] * channels + c[:, None]
    mask = (c < channels)[:, None] & (cell < CELLS)[None, :]
    upstream = tl.load(place, mask=mask, other=0.0).to(DOT_DTYPE)
    maps = grad_x + image * stride_b + c[:, None].to(tl.int64) * stride_c
    for block in tl.range(0, steps):
        k = (tl.program_id(1) * steps + block) * BLOCK_K + tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_C, BLOCK_K), ACC_DTYPE)
        for n0 in tl.static_range(0, N, BLOCK_N):
            if N > BLOCK_N:
                mask = (c < channels)[:, None] & (n0 + cell < CELLS)[None, :]
                upstream = tl.load(place + n0 * channels, mask=mask, other=0.0).to(DOT_DTYPE)
            for n in tl.static_range(N_SPLIT):
                weight_ptrs = weights + n * size * N + k[None, :] * N + n0 + cell[:, None]
                weight = tl.load(weight_ptrs, mask=(k < size)[None, :], other=0.0)
                acc = tl.dot(upstream, weight, acc, input_precision=PRECISION, out_dtype=ACC_DTYPE)
        if CONTIG_DIM == "run":
            first = grad_x + image * stride_b + (tl.program_id(0) % blocks_c).to(tl.int64) * BLOCK_C * SPAN
            _store_run(first, acc.to(grad_x.dtype.element_ty), SPAN, RUN, BLOCK_C, BLOCK_K)
        else:
            offset = _offsets(k, stride_h, stride_w, width, FLAT, INT64)[None, :]
            inside = (c < channels)[:, None] & (k < size)[None, :]
            tl.store(maps + offset, acc.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def weights_grad_kernel(
    grad, x, parts, batch, channels, height, width, stride_b, stride_c, stride_h, stride_w,
    CELLS: tl.constexpr, N: tl.constexpr, FLAT: tl.constexpr, INT64: tl.constexpr, CONTIG_DIM: tl.constexpr,
    DIVISIBLE_BY: tl.constexpr, SPAN: tl.constexpr, RUN: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dM, summed over every num_programs(1)-th (image, block of channels)."""
    size, channels, stride_b, stride_c, stride_h, stride_w = _divisible(
        height * width, channels, stride_b, stride_c, stride_h, stride_w, CONTIG_DIM, DIVISIBLE_BY
    )
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    cell = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = _offsets(k, stride_h, stride_w, width, FLAT, INT64)[None, :]
    blocks_c = tl.cdiv(channels, BLOCK_C)
    acc = tl.zeros((BLOCK_N, BLOCK_K), ACC_DTYPE)
    for block in tl.range(tl.program_id(1), batch * blocks_c, tl.num_programs(1)):
        image = (block // blocks_c).to(tl.int64)
        c = (block % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
        place = grad + image * CELLS * channels + cell[:, None] * channels + c[None, :]
        mask = (cell < CELLS)[:, None] & (c < channels)[None, :]
        upstream = tl.load(place, mask=mask, other=0.0).to(DOT_DTYPE)
        if CONTIG_DIM == "run":
            first = x + image * stride_b + (block % blocks_c).to(tl.int64) * BLOCK_C * SPAN
            tile = _load_run(first, SPAN, RUN, BLOCK_C, BLOCK_K)
        else:
            maps = x + image * stride_b + c[:, None].to(tl.int64) * stride_c
            inside = (c < channels)[:, None] & (k < size)[None, :]
            tile = tl.load(maps + offset, mask=inside, other=0.0)
        acc = tl.dot(upstream, tile.to(DOT_DTYPE), acc, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    place = parts + tl.program_id(1).to(tl.int64) * N * size + cell[:, None] * size + k[None, :]
    tl.store(place, acc, mask=(k < size)[None, :])


@triton.jit
def filter_grads_kernel(
    weights_grad, row_filters, col_filters, grad_rows, grad_cols, height, width,
    SCALES: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """dR[i, h] = sum_jw dM[(i, j), h, w] K[j, w] and dK[j, w] = sum_ih dM[(i, j), h, w] R[i, h]; one program per row
    of the stacked filters."""
    row = tl.program_id(0)
    w = tl.arange(0, BLOCK_W)
    first, filters = 0, 0
    for n in tl.static_range(len(SCALES)):
        if (row >= filters) & (row < filters + SCALES[n]):
            index = row - filters
            col_acc = tl.zeros((BLOCK_W,), ACC_DTYPE)
            for h0 in tl.range(0, height, BLOCK_H):
                h = h0 + tl.arange(0, BLOCK_H)
                mask = (h < height)[:, None] & (w < width)[None, :]
                row_acc = tl.zeros((BLOCK_H,), ACC_DTYPE)
                for other in tl.static_range(tl.constexpr(SCALES[n])):
                    place = h[:, None] * width + w[None, :]
                    as_row = weights_grad + (first + index * SCALES[n] + other) * height * width + place
                    col_weight = tl.load(col_filters + (filters + other) * width + w, mask=w < width, other=0.0)
                    row_acc += tl.sum(tl.load(as_row, mask=mask, other=0.0) * col_weight[None, :], 1)
                    as_col = weights_grad + (first + other * SCALES[n] + index) * height * width + place
                    row_weight = tl.load(row_filters + (filters + other) * height + h, mask=h < height, other=0.0)
                    col_acc += tl.sum(tl.load(as_col, mask=mask, other=0.0) * row_weight[:, None], 0)
                tl.store(grad_rows + row * height + h, row_acc, mask=h < height)
            tl.store(grad_cols + row * width + w, col_acc, mask=w < width)
        first, filters = first + SCALES[n] * SCALES[n], filters + SCALES[n]
