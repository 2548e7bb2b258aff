"""Launchers of the kernels in `lowpass_kernels.py`; arguments are those of the ops in `lfcc_kernels/ops/lowpass.py`."""

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
    """A map (B, C, H, W), or tokens viewed as one, with strides in elements."""

    data: Tensor
    batch: int
    channels: int
    height: int
    width: int
    strides: tuple[int, int, int, int]  # of images, channels, rows and columns

    @classmethod
    def of(cls, x: Tensor, grid: list[int], prefix_tokens: int) -> "_Map":
        if x.dim() == 4:
            batch, channels, height, width = x.shape
            return cls(x, batch, channels, height, width, x.stride())
        batch, _tokens, channels = x.shape
        stride_b, stride_token, stride_c = x.stride()
        strides = stride_b, stride_c, grid[1] * stride_token, stride_token
        return cls(x[:, prefix_tokens:], batch, channels, grid[0], grid[1], strides)

    @property
    def size(self) -> int:
        return self.height * self.width

    def blocks(self, tiles: dict[str, int]) -> int:
        """Number of channel blocks of all images."""
        return self.batch * triton.cdiv(self.channels, tiles["BLOCK_C"])

    def arguments(self, kernel: str, dot_dtype: torch.dtype, columns: int) -> tuple[list[int], dict]:
        """Kernel arguments after the pointers: sizes and strides, and the layout's constexprs with tile sizes.

        Tiles are no larger than the map and no smaller than tl.dot needs for `dot_dtype`.
        """
        tiles = tiling.tiles(kernel, str(dot_dtype.itemsize), runtime.device_props(self.data.device).capability)
        stride_b, stride_c, stride_h, stride_w = self.strides
        if self.width == 1:
            stride_w = stride_h
        flat = self.height == 1 or stride_h == self.width * stride_w
        contig_dim, multiples, span = "none", [1], 0
        if stride_c == 1:
            contig_dim, multiples = "channels", [stride_b, stride_h, stride_w, self.channels]
        elif stride_w == 1 and flat:
            contig_dim, multiples = "pixels", [stride_b, stride_c, self.size]
            # For 16-bit elements only: accesses of 32-bit ones are wide enough, and the compiler would spill.
            if dot_dtype.itemsize == 2 and math.gcd(8, *multiples) < 8 and stride_c == self.size:
                run_c, run_k = self._run(columns)
                if run_c:
                    contig_dim, multiples, span = "run", [stride_b], self.size
                    # The loop has one iteration, so further stages would only take shared memory.
                    tiles = tiles | {"BLOCK_C": run_c, "BLOCK_K": run_k, "num_warps": 4}
                    tiles |= {"num_warps": 8, "num_stages": 1} if kernel == "lowpass" else {}
        warps = tiles.get("num_warps", 4)
        tiles = tiling.clamp_block(tiling.clamp_block(tiles, "BLOCK_C", self.channels), "BLOCK_K", self.size)
        # The accumulator of filter gradients does not shrink with the channels, a run is shared by all warps, and wgmma
        # needs four of them.
        if kernel == "lowpass_filter_grad" or span:
            tiles["num_warps"] = warps
        elif tiles["BLOCK_C"] >= 64:
            tiles["num_warps"] = max(4, tiles["num_warps"])
        sizes = [self.channels, self.height, self.width, stride_b, stride_c, stride_h, stride_w]
        layout = {
            "FLAT": flat,
            "INT64": (self.size - 1) * max(stride_h, stride_w) >= 2**31,
            "CONTIG_DIM": contig_dim,
            "DIVISIBLE_BY": math.gcd(16, *multiples),
            "SPAN": span,
            "RUN": triton.next_power_of_2(max(1, tiles["BLOCK_C"] * span)),
        }
        return sizes, layout | tiles

    def _run(self, columns: int) -> tuple[int, int]:
        """Channels and pixels of a tile of whole maps that divides the channels; 0 channels if there is none."""
        pixels = max(16, triton.next_power_of_2(self.size))
        channels = min(64, 8192 // pixels) if pixels * min(columns, 64) <= 8192 else 0
        while channels >= 16 and self.channels % channels:
            channels //= 2
        return (channels if channels >= 16 else 0), pixels


@dataclass(frozen=True)
class _Weights:
    """M of `lowpass_kernels.py` for one map size, as `splits` matrices that sum to it."""

    data: Tensor  # (splits, H * W, cells rounded up to a tile)
    splits: int

    @property
    def columns(self) -> int:
        return self.data.shape[2]

    @property
    def dot_options(self) -> dict:
        """Constexprs of products with M."""
        return {
            "N": self.columns,
            "N_SPLIT": self.splits,
            "BLOCK_N": _block_n(self.columns),
            "DOT_DTYPE": runtime.to_tl_dtype(self.data.dtype),
            "PRECISION": runtime.precision(self.data.dtype, as_matmul=False),
        }


def lowpass(
    x: Tensor, scales: list[int], row_filters: Tensor | None, col_filters: Tensor | None, grid: list[int],
    prefix_tokens: int,
) -> Tensor:  # fmt: skip
    """The pyramid (B, cells, C) in x's dtype."""
    source, cells = _Map.of(x, grid, prefix_tokens), sum(s * s for s in scales)
    y = x.new_empty(source.batch, cells, source.channels)
    with runtime.on_device(x):
        weights = _weights(source, scales, row_filters, col_filters, mean=False)
        sizes, layout = source.arguments("lowpass", weights.data.dtype, weights.columns)
        kernels.forward_kernel[(source.blocks(layout), weights.columns // _block_n(weights.columns))](
            source.data, weights.data, y, *sizes, SCALES=tuple(scales), CELLS=cells, AVERAGE=row_filters is None,
            ACC_DTYPE=runtime.to_tl_dtype(accumulator(x.dtype)), **weights.dot_options, **layout,
        )  # fmt: skip
    return y


def lowpass_input_grad(
    grad: Tensor, size: list[int], channels_last: bool, scales: list[int], row_filters: Tensor | None,
    col_filters: Tensor | None, grid: list[int], prefix_tokens: int,
) -> Tensor:  # fmt: skip
    """dX of the given size, contiguous or channels_last."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    grad_x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    target, grad = _Map.of(grad_x, grid, prefix_tokens), grad.contiguous()
    if prefix_tokens:
        grad_x[:, :prefix_tokens] = 0
    with runtime.on_device(grad):
        weights = _weights(target, scales, row_filters, col_filters, mean=True)
        sizes, layout = target.arguments("lowpass_input_grad", weights.data.dtype, weights.columns)
        images, blocks_k = target.blocks(layout), triton.cdiv(target.size, layout["BLOCK_K"])
        # Enough programs for every multiprocessor; more would only read dY again.
        splits = min(blocks_k, triton.cdiv(4 * runtime.device_props(grad.device).multiprocessors, images))
        kernels.input_grad_kernel[(images, splits)](
            grad, weights.data, target.data, *sizes, triton.cdiv(blocks_k, splits), CELLS=grad.shape[1],
            ACC_DTYPE=runtime.to_tl_dtype(accumulator(grad.dtype)), **weights.dot_options, **layout,
        )  # fmt: skip
    return grad_x


def lowpass_filter_grad(
    grad: Tensor, x: Tensor, scales: list[int], row_filters: Tensor, col_filters: Tensor, grid: list[int],
    prefix_tokens: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dR and dK, in the shapes of the filters."""
    source, grad = _Map.of(x, grid, prefix_tokens), grad.contiguous()
    grads = row_filters.new_empty(row_filters.shape), col_filters.new_empty(col_filters.shape)
    dot_dtype, acc_dtype = runtime.compute_dtype(x.dtype), accumulator(x.dtype)
    columns = _columns(grad.shape[1])
    block_n = _block_n(columns)
    sizes, layout = source.arguments("lowpass_filter_grad", dot_dtype, columns)
    with runtime.on_device(x):
        blocks, blocks_k = source.blocks(layout), triton.cdiv(source.size, layout["BLOCK_K"])
        parts = min(blocks, triton.cdiv(2 * runtime.device_props(x.device).multiprocessors, blocks_k))
        weights_grad = grad.new_empty(parts, columns, source.size, dtype=acc_dtype)
        kernels.weights_grad_kernel[(blocks_k, parts, columns // block_n)](
            grad, source.data, weights_grad, source.batch, *sizes, CELLS=grad.shape[1], N=columns,
            DOT_DTYPE=runtime.to_tl_dtype(dot_dtype), PRECISION=runtime.precision(dot_dtype, as_matmul=False),
            ACC_DTYPE=runtime.to_tl_dtype(acc_dtype), BLOCK_N=block_n, **layout,
        )  # fmt: skip
        kernels.filter_grads_kernel[(sum(scales),)](
            weights_grad.sum(0), row_filters.contiguous(), col_filters.contiguous(), *grads, source.height,
            source.width, SCALES=tuple(scales), ACC_DTYPE=runtime.to_tl_dtype(acc_dtype),
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
    """M of these filters; for the average windows of ones, divided by their area if `mean`.

    Computed in every call, which takes a launch of microseconds. A cached M would be lost to CUDA graphs, which own the
    memory that is allocated while they warm up.
    """
    dtype = source.data.dtype
    filtered = row_filters is not None and col_filters is not None
    mean = mean and not filtered  # filters already contain their scale
    exact = not filtered and not mean  # ones and zeros
    # Other weights are one matrix of float32, or two of bfloat16, which has the same range; float16 has not.
    if dtype == torch.float16 and not exact:
        dtype = torch.float32
    dtype = runtime.compute_dtype(dtype)
    splits = 2 if dtype == torch.bfloat16 and not exact else 1
    columns = _columns(sum(s * s for s in scales))
    data = torch.empty(splits, source.size, columns, dtype=dtype, device=source.data.device)
    block_n = _block_n(columns)
    block_k = tiling.tiles("weights", "any", runtime.device_props(data.device).capability)["BLOCK_K"]
    kernels.weights_kernel[(triton.cdiv(source.size, block_k), columns // block_n)](
        row_filters.contiguous() if filtered else data, col_filters.contiguous() if filtered else data, data,
        source.height, source.width, SCALES=tuple(scales), N=columns, N_SPLIT=splits, FILTERED=filtered,
        MEAN=mean, ACC_DTYPE=runtime.to_tl_dtype(accumulator(dtype)), BLOCK_K=block_k, BLOCK_N=block_n,
    )  # fmt: skip
    return _Weights(data, splits)
