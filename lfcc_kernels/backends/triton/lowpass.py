"""Launches the kernels of `lowpass_kernels.py`; arguments are those of the ops in `lfcc_kernels/ops/lowpass.py`."""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lfcc_kernels.backends.dtypes import accumulator
from lfcc_kernels.backends.triton import lowpass_kernels as kernels
from lfcc_kernels.backends.triton import runtime
from lfcc_kernels.backends.triton import tiles as tiling


@dataclass(frozen=True)
class _Map:
    """A map (B, C, H, W), or tokens seen as one, with strides in elements."""

    data: Tensor
    batch: int
    channels: int
    height: int
    width: int
    strides: tuple[int, int, int, int]  # of images, channels, rows and columns

    @classmethod
    def of(cls, x: Tensor, grid: list[int], prefix_tokens: int) -> "_Map":
        if x.dim() == 4:
            return cls(x, *x.shape, x.stride())
        batch, _tokens, channels = x.shape
        of_image, of_token, of_channel = x.stride()
        strides = of_image, of_channel, grid[1] * of_token, of_token
        return cls(x[:, prefix_tokens:], batch, channels, *grid, strides)

    @property
    def size(self) -> int:
        return self.height * self.width

    def blocks(self, tiles: dict[str, int]) -> int:
        """Blocks of channels of all images."""
        return self.batch * triton.cdiv(self.channels, tiles["BLOCK_C"])

    def arguments(self, kernel: str, product: torch.dtype, columns: int) -> tuple[list[int], dict]:
        """What a kernel gets of the map behind its data: numbers, and how it lies in memory with tiles to suit.

        Tiles are no larger than the map, and no smaller than tl.dot takes, for products of the given type.
        """
        tiles = tiling.tiles(kernel, str(product.itemsize), runtime.chip(self.data.device).capability)
        of_image, of_channel, of_row, of_column = self.strides
        if self.width == 1:
            of_column = of_row
        flat = self.height == 1 or of_row == self.width * of_column
        inner, even, span = "nothing", [1], 0
        if of_channel == 1:
            inner, even = "channels", [of_image, of_row, of_column, self.channels]
        elif of_column == 1 and flat:
            inner, even = "positions", [of_image, of_channel, self.size]
            run_c, run_k = self._run(columns)
            # Of two bytes alone: four are wider anyway, and with them the compiler spills.
            if product.itemsize == 2 and math.gcd(8, *even) < 8 and of_channel == self.size and run_c:
                inner, even, span = "run", [of_image], self.size
                # One trip takes it all, so that stages would only take shared memory.
                tiles = tiles | {"BLOCK_C": run_c, "BLOCK_K": run_k, "num_warps": 4}
                tiles |= {"num_warps": 8, "num_stages": 1} if kernel == "lowpass" else {}
        warps = tiles.get("num_warps", 4)
        tiles = tiling.cut(tiling.cut(tiles, "BLOCK_C", self.channels), "BLOCK_K", self.size)
        # Sums of filter gradients are as large with few channels, a run is shared by all, and wgmma takes four warps.
        if kernel == "lowpass_filter_grad" or span:
            tiles["num_warps"] = warps
        elif tiles["BLOCK_C"] >= 64:
            tiles["num_warps"] = max(4, tiles["num_warps"])
        numbers = [self.channels, self.height, self.width, of_image, of_channel, of_row, of_column]
        run = triton.next_power_of_2(max(1, tiles["BLOCK_C"] * span))
        wide = (self.size - 1) * max(of_row, of_column) >= 2**31
        layout = {"FLAT": flat, "WIDE": wide, "INNER": inner, "EVEN": math.gcd(16, *even), "SPAN": span, "RUN": run}
        return numbers, layout | tiles

    def _run(self, columns: int) -> tuple[int, int]:
        """Channels and positions of a tile of whole maps without a rest; 0 channels where there is none."""
        positions = max(16, triton.next_power_of_2(self.size))
        channels = min(64, 8192 // positions) if positions * min(columns, 64) <= 8192 else 0
        while channels >= 16 and self.channels % channels:
            channels //= 2
        return (channels if channels >= 16 else 0), positions


@dataclass(frozen=True)
class _Weights:
    """M of `lowpass_kernels.py` for one map size, as `pieces` matrices that sum to it."""

    data: Tensor  # (pieces, H * W, cells rounded up to a tile)
    pieces: int

    @property
    def columns(self) -> int:
        return self.data.shape[2]


def lowpass(
    x: Tensor,
    scales: list[int],
    row_filters: Tensor | None,
    col_filters: Tensor | None,
    grid: list[int],
    prefix_tokens: int,
) -> Tensor:
    """The pyramid (B, cells, C) in x's dtype."""
    source, cells = _Map.of(x, grid, prefix_tokens), sum(s * s for s in scales)
    y = x.new_empty(source.batch, cells, source.channels)
    with runtime.on_device(x):
        weights = _weights(source, scales, row_filters, col_filters, mean=False)
        product = weights.data.dtype
        numbers, layout = source.arguments("lowpass", product, weights.columns)
        block_n = _block_n(weights.columns)
        kernels.forward_kernel[(source.blocks(layout), weights.columns // block_n)](
            source.data, weights.data, y, *numbers, SCALES=tuple(scales), CELLS=cells, N=weights.columns,
            PIECES=weights.pieces, AVERAGE=row_filters is None, PRODUCT=runtime.in_triton(product),
            PRECISION=runtime.precision(product, as_matmul=False), SUM=runtime.in_triton(accumulator(x.dtype)),
            BLOCK_N=block_n, **layout,
        )  # fmt: skip
    return y


def lowpass_input_grad(
    grad: Tensor,
    size: list[int],
    channels_last: bool,
    scales: list[int],
    row_filters: Tensor | None,
    col_filters: Tensor | None,
    grid: list[int],
    prefix_tokens: int,
) -> Tensor:
    """dX of the given size, contiguous or channels_last."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad_x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout)
    target, grad = _Map.of(grad_x, grid, prefix_tokens), grad.contiguous()
    if prefix_tokens:
        grad_x[:, :prefix_tokens] = 0
    with runtime.on_device(grad):
        weights = _weights(target, scales, row_filters, col_filters, mean=True)
        product = weights.data.dtype
        numbers, layout = target.arguments("lowpass_input_grad", product, weights.columns)
        images, blocks_k = target.blocks(layout), triton.cdiv(target.size, layout["BLOCK_K"])
        # Enough programs for every multiprocessor; more would only read dY again.
        splits = min(blocks_k, triton.cdiv(4 * runtime.chip(grad.device).multiprocessors, images))
        kernels.input_grad_kernel[(images, splits)](
            grad, weights.data, target.data, *numbers, triton.cdiv(blocks_k, splits), CELLS=grad.shape[1],
            N=weights.columns, PIECES=weights.pieces, PRODUCT=runtime.in_triton(product),
            PRECISION=runtime.precision(product, as_matmul=False), SUM=runtime.in_triton(accumulator(grad.dtype)),
            BLOCK_N=_block_n(weights.columns), **layout,
        )  # fmt: skip
    return grad_x


def lowpass_filter_grad(
    grad: Tensor,
    x: Tensor,
    scales: list[int],
    row_filters: Tensor,
    col_filters: Tensor,
    grid: list[int],
    prefix_tokens: int,
) -> tuple[Tensor, Tensor]:
    """dR and dK, in the shapes of the filters."""
    source, grad = _Map.of(x, grid, prefix_tokens), grad.contiguous()
    grads = row_filters.new_empty(row_filters.shape), col_filters.new_empty(col_filters.shape)
    product, total = runtime.raised(x.dtype), accumulator(x.dtype)
    columns = _columns(grad.shape[1])
    block_n = _block_n(columns)
    numbers, layout = source.arguments("lowpass_filter_grad", product, columns)
    with runtime.on_device(x):
        blocks, blocks_k = source.blocks(layout), triton.cdiv(source.size, layout["BLOCK_K"])
        parts = min(blocks, triton.cdiv(2 * runtime.chip(x.device).multiprocessors, blocks_k))
        of_weights = grad.new_empty(parts, columns, source.size, dtype=total)
        kernels.weights_grad_kernel[(blocks_k, parts, columns // block_n)](
            grad, source.data, of_weights, source.batch, *numbers, CELLS=grad.shape[1], N=columns,
            PRODUCT=runtime.in_triton(product), PRECISION=runtime.precision(product, as_matmul=False),
            SUM=runtime.in_triton(total), BLOCK_N=block_n, **layout,
        )  # fmt: skip
        kernels.filter_grads_kernel[(sum(scales),)](
            of_weights.sum(0), row_filters.contiguous(), col_filters.contiguous(), *grads, source.height, source.width,
            SCALES=tuple(scales), SUM=runtime.in_triton(total),
            BLOCK_H=16, BLOCK_W=triton.next_power_of_2(source.width),
        )  # fmt: skip
    return grads


def _block_n(columns: int) -> int:
    return min(columns, 64)


def _columns(cells: int) -> int:
    return max(16, triton.next_power_of_2(cells))


def _weights(
    source: _Map, scales: list[int], row_filters: Tensor | None, col_filters: Tensor | None, mean: bool
) -> _Weights:
    """M of these filters; the average's windows of ones, divided by their size if `mean`.

    Made anew in every call, a launch of microseconds: what is kept would be lost to CUDA graphs, which own the memory
    that is taken while they warm up.
    """
    dtype = source.data.dtype
    filtered = row_filters is not None and col_filters is not None
    mean = mean and not filtered  # filters hold their weights as they are
    exact = not filtered and not mean
    # Weights with digits are one matrix of float32, or two of bfloat16, whose range is the same; float16's is not.
    if dtype == torch.float16 and not exact:
        dtype = torch.float32
    dtype = runtime.raised(dtype)
    pieces = 2 if dtype == torch.bfloat16 and not exact else 1
    columns = _columns(sum(s * s for s in scales))
    data = torch.empty(pieces, source.size, columns, dtype=dtype, device=source.data.device)
    block_n = _block_n(columns)
    block_k = tiling.tiles("weights", "any", runtime.chip(data.device).capability)["BLOCK_K"]
    kernels.weights_kernel[(triton.cdiv(source.size, block_k), columns // block_n)](
        row_filters.contiguous() if filtered else data, col_filters.contiguous() if filtered else data, data,
        source.height, source.width, SCALES=tuple(scales), N=columns, PIECES=pieces, FILTERED=filtered,
        MEAN=mean, SUM=runtime.in_triton(accumulator(dtype)), BLOCK_K=block_k, BLOCK_N=block_n,
    )  # fmt: skip
    return _Weights(data, pieces)
