"""The low-pass pyramid as skinny matrix products, one read of the map for all scales.

With k = (h, w) a position, n = (s, i, j) a cell and M[k, n] = R_s[i, h] K_s[j, w]:

    forward       Y[b, n, c]  = sum_k X[b, c, k] M[k, n]        reads X once
    input grad    dX[b, c, k] = sum_n dY[b, n, c] M[k, n]       writes dX once: a gather, no atomics
    filter grad   dM[n, k]    = sum_bc dY[b, n, c] X[b, c, k]   reads X once more; dR, dK follow from dM

M is small (H W x 32) and lives in L2. It is one to two matrices of the products' type that sum to the exact
weights, so tensor cores lose nothing; the average keeps windows of ones and multiplies by 1/|window| at the end,
which leaves constant maps exact.

Tiles are (channels of an image) x (positions). Strides are free: where positions (NCHW) or channels (channels-last,
tokens) lie next to each other, accesses along them are 16 bytes wide. Two-byte maps of NCHW that are no multiple of 16
bytes, as 7 x 7 and 14 x 14, are read and written as one run over the tile's channels, put in order in shared memory.

Bytes: X + Y forward, dX + dY backward, and M from L2 once a tile of channels: 64 / (2 BLOCK_C) of X's at two bytes.
FLOPs: 64 an element of X and piece of M, which tensor cores do in a fraction of the time the bytes take.
"""

import triton
import triton.language as tl


@triton.jit
def _cells(cell, height, width, SCALES: tl.constexpr):
    """Of each cell: its rows in the stacked filters, and its window's bounds, empty past the last cell."""
    row_filter, col_filter = cell * 0, cell * 0
    top, bottom, left, right = cell * 0, cell * 0, cell * 0, cell * 0
    first, filters = 0, 0
    for n in tl.static_range(len(SCALES)):
        here = (cell >= first) & (cell < first + SCALES[n] * SCALES[n])
        i, j = (cell - first) // SCALES[n], (cell - first) % SCALES[n]
        row_filter, col_filter = tl.where(here, filters + i, row_filter), tl.where(here, filters + j, col_filter)
        top = tl.where(here, i * height // SCALES[n], top)
        bottom = tl.where(here, ((i + 1) * height + SCALES[n] - 1) // SCALES[n], bottom)
        left = tl.where(here, j * width // SCALES[n], left)
        right = tl.where(here, ((j + 1) * width + SCALES[n] - 1) // SCALES[n], right)
        first, filters = first + SCALES[n] * SCALES[n], filters + SCALES[n]
    return row_filter, col_filter, top, bottom, left, right


@triton.jit
def _areas(top, bottom, left, right, SUM: tl.constexpr):
    """Positions in each window, 1 past the last cell."""
    return tl.maximum((bottom - top) * (right - left), 1).to(SUM)


@triton.jit
def _divide(numerator, denominator):
    """Rounded to nearest; Triton's own division of float32 is two units off."""
    return numerator / denominator if numerator.dtype == tl.float64 else tl.div_rn(numerator, denominator)


@triton.jit
def _positions(k, stride_h, stride_w, width, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of positions inside a channel's map; FLAT where rows follow each other without a gap, WIDE where they do
    not fit 32 bits."""
    k = k.to(tl.int64) if WIDE else k
    return k * stride_w if FLAT else (k // width) * stride_h + (k % width) * stride_w


@triton.jit
def _even(size, channels, stride_b, stride_c, stride_h, stride_w, INNER: tl.constexpr, EVEN: tl.constexpr):
    """The same numbers, in a form that shows the compiler that EVEN divides them, which widens accesses; INNER names
    what lies next to each other. Hints on arguments are lost where a function is inlined, products are not."""
    stride_b = stride_b // EVEN * EVEN
    if INNER == "positions":
        size, stride_c = size // EVEN * EVEN, stride_c // EVEN * EVEN
    if INNER == "channels":
        channels = channels // EVEN * EVEN
        stride_h, stride_w = stride_h // EVEN * EVEN, stride_w // EVEN * EVEN
    return size, channels, stride_b, stride_c, stride_h, stride_w


@triton.jit
def _load_run(first, SPAN: tl.constexpr, RUN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tile of BLOCK_C maps of SPAN positions that follow each other from `first`. What is beyond a map's positions
    is not zero."""
    run = tl.arange(0, RUN)
    values = tl.load(first + run, mask=run < BLOCK_C * SPAN, other=0.0)
    place = tl.arange(0, BLOCK_C * BLOCK_K)
    source = (place // BLOCK_K) * SPAN + tl.minimum(place % BLOCK_K, SPAN - 1)
    return tl.reshape(tl.gather(values, source, 0), (BLOCK_C, BLOCK_K))


@triton.jit
def _store_run(first, tile, SPAN: tl.constexpr, RUN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Puts the tile of BLOCK_C maps of SPAN positions, one after the other, from `first` on."""
    run = tl.arange(0, RUN)
    source = tl.minimum(run // SPAN, BLOCK_C - 1) * BLOCK_K + run % SPAN
    values = tl.gather(tl.reshape(tile, (BLOCK_C * BLOCK_K,)), source, 0)
    tl.store(first + run, values, mask=run < BLOCK_C * SPAN)


@triton.jit
def weights_kernel(
    row_filters, col_filters, weights, height, width,
    SCALES: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr, FILTERED: tl.constexpr, MEAN: tl.constexpr,
    SUM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """M as PIECES matrices (height * width, N) that sum to it; the average's windows, divided by their size if MEAN."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    cell = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = k < height * width
    row_filter, col_filter, top, bottom, left, right = _cells(cell, height, width, SCALES)
    h, w = (k // width)[:, None], (k % width)[:, None]
    if FILTERED:
        mask = inside[:, None] & (bottom > top)[None, :]
        along_rows = tl.load(row_filters + row_filter[None, :] * height + h, mask=mask, other=0.0)
        along_cols = tl.load(col_filters + col_filter[None, :] * width + w, mask=mask, other=0.0)
        value = along_rows * along_cols
    else:
        covered = (h >= top[None, :]) & (h < bottom[None, :]) & (w >= left[None, :]) & (w < right[None, :])
        value = tl.where(covered, 1.0, 0.0).to(SUM)
        if MEAN:
            value = _divide(value, _areas(top, bottom, left, right, SUM)[None, :])
    for n in tl.static_range(PIECES):
        piece = value.to(weights.dtype.element_ty)
        place = n * height * width * N + k[:, None] * N + cell[None, :]
        tl.store(weights + place, piece, mask=inside[:, None])
        value -= piece.to(value.dtype)


@triton.jit
def forward_kernel(
    x, weights, y, channels, height, width, stride_b, stride_c, stride_h, stride_w,
    SCALES: tl.constexpr, CELLS: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr, AVERAGE: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr, SPAN: tl.constexpr,
    RUN: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of one image, all its positions, BLOCK_N cells: all of them if scales are few."""
    COMPENSATED: tl.constexpr = x.dtype.element_ty.primitive_bitwidth >= 32
    size, channels, stride_b, stride_c, stride_h, stride_w = _even(
        height * width, channels, stride_b, stride_c, stride_h, stride_w, INNER, EVEN
    )
    blocks_c = tl.cdiv(channels, BLOCK_C)
    image = (tl.program_id(0) // blocks_c).to(tl.int64)
    c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    cell, step = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    maps = x + image * stride_b + c[:, None].to(tl.int64) * stride_c
    first = x + image * stride_b + (tl.program_id(0) % blocks_c).to(tl.int64) * BLOCK_C * SPAN
    sums = tl.zeros((BLOCK_C, BLOCK_N), SUM)
    lost = tl.zeros((BLOCK_C, BLOCK_N), SUM)
    for k0 in tl.range(0, size, BLOCK_K):
        k = k0 + step
        if INNER == "run":
            tile = _load_run(first, SPAN, RUN, BLOCK_C, BLOCK_K)
        else:
            mask = (c < channels)[:, None] & (k < size)[None, :]
            tile = tl.load(maps + _positions(k, stride_h, stride_w, width, FLAT, WIDE)[None, :], mask=mask, other=0.0)
        # Four-byte results show the rounding of a sum of thousands, so theirs is taken with compensation (Kahan).
        part = tl.zeros((BLOCK_C, BLOCK_N), SUM) if COMPENSATED else sums
        for n in tl.static_range(PIECES):
            place = weights + n * size * N + k[:, None] * N + cell[None, :]
            piece = tl.load(place, mask=(k < size)[:, None], other=0.0)
            part = tl.dot(tile.to(PRODUCT), piece, part, input_precision=PRECISION, out_dtype=SUM)
        if COMPENSATED:
            part -= lost
            total = sums + part
            lost = (total - sums) - part
            sums = total
        else:
            sums = part

    if AVERAGE:
        # NaN or infinity in a map times the zero weight of a window outside it is NaN: sum such maps by windows.
        # In small steps, so that this rare way takes no registers from the other one.
        if tl.max(tl.where(tl.abs(sums) < float("inf"), 0, 1)) > 0:
            for n in tl.range(tl.program_id(1) * BLOCK_N, tl.minimum(CELLS, (tl.program_id(1) + 1) * BLOCK_N)):
                column = tl.zeros((BLOCK_C,), SUM)
                for k0 in tl.range(0, size, 16):
                    k = k0 + tl.arange(0, 16)
                    mask = (c < channels)[:, None] & (k < size)[None, :]
                    offset = _positions(k, stride_h, stride_w, width, FLAT, WIDE)[None, :]
                    part = tl.load(maps + offset, mask=mask, other=0.0).to(SUM)
                    weight = tl.load(weights + k * N + n, mask=k < size, other=0.0)
                    column += tl.sum(tl.where(weight[None, :] != 0, part, 0.0), 1)
                sums = tl.where((cell == n)[None, :], column[:, None], sums)
        _row, _col, top, bottom, left, right = _cells(cell, height, width, SCALES)
        sums = _divide(sums, _areas(top, bottom, left, right, SUM)[None, :])

    place = y + image * CELLS * channels + cell[None, :] * channels + c[:, None]
    tl.store(place, sums.to(y.dtype.element_ty), mask=(c < channels)[:, None] & (cell < CELLS)[None, :])


@triton.jit
def input_grad_kernel(
    grad, weights, grad_x, channels, height, width, stride_b, stride_c, stride_h, stride_w, steps,
    CELLS: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    INNER: tl.constexpr, EVEN: tl.constexpr, SPAN: tl.constexpr, RUN: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of one image, `steps` blocks of positions; dY is read once if cells are few."""
    size, channels, stride_b, stride_c, stride_h, stride_w = _even(
        height * width, channels, stride_b, stride_c, stride_h, stride_w, INNER, EVEN
    )
    blocks_c = tl.cdiv(channels, BLOCK_C)
    image = (tl.program_id(0) // blocks_c).to(tl.int64)
    c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    cell = tl.arange(0, BLOCK_N)
    place = grad + image * CELLS * channels + cell[None, :] * channels + c[:, None]
    mask = (c < channels)[:, None] & (cell < CELLS)[None, :]
    upstream = tl.load(place, mask=mask, other=0.0).to(PRODUCT)
    maps = grad_x + image * stride_b + c[:, None].to(tl.int64) * stride_c
    for block in tl.range(0, steps):
        k = (tl.program_id(1) * steps + block) * BLOCK_K + tl.arange(0, BLOCK_K)
        tile = tl.zeros((BLOCK_C, BLOCK_K), SUM)
        for n0 in tl.static_range(0, N, BLOCK_N):
            if N > BLOCK_N:
                there = (c < channels)[:, None] & (n0 + cell < CELLS)[None, :]
                upstream = tl.load(place + n0 * channels, mask=there, other=0.0).to(PRODUCT)
            for n in tl.static_range(PIECES):
                from_weights = weights + n * size * N + k[None, :] * N + n0 + cell[:, None]
                piece = tl.load(from_weights, mask=(k < size)[None, :], other=0.0)
                tile = tl.dot(upstream, piece, tile, input_precision=PRECISION, out_dtype=SUM)
        if INNER == "run":
            first = grad_x + image * stride_b + (tl.program_id(0) % blocks_c).to(tl.int64) * BLOCK_C * SPAN
            _store_run(first, tile.to(grad_x.dtype.element_ty), SPAN, RUN, BLOCK_C, BLOCK_K)
        else:
            offset = _positions(k, stride_h, stride_w, width, FLAT, WIDE)[None, :]
            inside = (c < channels)[:, None] & (k < size)[None, :]
            tl.store(maps + offset, tile.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def weights_grad_kernel(
    grad, x, parts, batch, channels, height, width, stride_b, stride_c, stride_h, stride_w,
    CELLS: tl.constexpr, N: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, INNER: tl.constexpr,
    EVEN: tl.constexpr, SPAN: tl.constexpr, RUN: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    SUM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dM, summed over every so many-th (image, block of channels)."""
    size, channels, stride_b, stride_c, stride_h, stride_w = _even(
        height * width, channels, stride_b, stride_c, stride_h, stride_w, INNER, EVEN
    )
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    cell = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = _positions(k, stride_h, stride_w, width, FLAT, WIDE)[None, :]
    blocks_c = tl.cdiv(channels, BLOCK_C)
    sums = tl.zeros((BLOCK_N, BLOCK_K), SUM)
    for block in tl.range(tl.program_id(1), batch * blocks_c, tl.num_programs(1)):
        image = (block // blocks_c).to(tl.int64)
        c = (block % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
        place = grad + image * CELLS * channels + cell[:, None] * channels + c[None, :]
        mask = (cell < CELLS)[:, None] & (c < channels)[None, :]
        upstream = tl.load(place, mask=mask, other=0.0).to(PRODUCT)
        if INNER == "run":
            first = x + image * stride_b + (block % blocks_c).to(tl.int64) * BLOCK_C * SPAN
            tile = _load_run(first, SPAN, RUN, BLOCK_C, BLOCK_K)
        else:
            maps = x + image * stride_b + c[:, None].to(tl.int64) * stride_c
            inside = (c < channels)[:, None] & (k < size)[None, :]
            tile = tl.load(maps + offset, mask=inside, other=0.0)
        sums = tl.dot(upstream, tile.to(PRODUCT), sums, input_precision=PRECISION, out_dtype=SUM)
    place = parts + tl.program_id(1).to(tl.int64) * N * size + cell[:, None] * size + k[None, :]
    tl.store(place, sums, mask=(k < size)[None, :])


@triton.jit
def filter_grads_kernel(
    weights_grad, row_filters, col_filters, grad_rows, grad_cols, height, width,
    SCALES: tl.constexpr, SUM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """dR[i, h] = sum_jw dM[(i, j), h, w] K[j, w] and dK[j, w] = sum_ih dM[(i, j), h, w] R[i, h], one row a program."""
    row = tl.program_id(0)
    w = tl.arange(0, BLOCK_W)
    first, filters = 0, 0
    for n in tl.static_range(len(SCALES)):
        if (row >= filters) & (row < filters + SCALES[n]):
            own = row - filters
            of_col = tl.zeros((BLOCK_W,), SUM)
            for h0 in tl.range(0, height, BLOCK_H):
                h = h0 + tl.arange(0, BLOCK_H)
                mask = (h < height)[:, None] & (w < width)[None, :]
                of_row = tl.zeros((BLOCK_H,), SUM)
                for other in tl.static_range(tl.constexpr(SCALES[n])):
                    place = h[:, None] * width + w[None, :]
                    as_row = weights_grad + (first + own * SCALES[n] + other) * height * width + place
                    along_cols = tl.load(col_filters + (filters + other) * width + w, mask=w < width, other=0.0)
                    of_row += tl.sum(tl.load(as_row, mask=mask, other=0.0) * along_cols[None, :], 1)
                    as_col = weights_grad + (first + other * SCALES[n] + own) * height * width + place
                    along_rows = tl.load(row_filters + (filters + other) * height + h, mask=h < height, other=0.0)
                    of_col += tl.sum(tl.load(as_col, mask=mask, other=0.0) * along_rows[:, None], 0)
                tl.store(grad_rows + row * height + h, of_row, mask=h < height)
            tl.store(grad_cols + row * width + w, of_col, mask=w < width)
        first, filters = first + SCALES[n] * SCALES[n], filters + SCALES[n]
