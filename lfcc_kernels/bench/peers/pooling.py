"""The pyramid of `lowpass`, (B, cells, C) with any strides, written with torch."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def as_map(tokens: Tensor, grid: tuple[int, int], prefix_tokens: int) -> Tensor:
    """Tokens (B, N, C) viewed as a map (B, C, H, W)."""
    return tokens[:, prefix_tokens:].transpose(1, 2).unflatten(2, grid)


def pool_each_scale(x: Tensor, scales: Sequence[int]) -> Tensor:
    """adaptive_avg_pool2d, once per scale."""
    return _pyramid([F.adaptive_avg_pool2d(x, s) for s in scales])


def filter_each_scale(x: Tensor, row_filters: Tensor, col_filters: Tensor, scales: Sequence[int]) -> Tensor:
    """R_s F K_s^T, once per scale."""
    filters = zip(row_filters.to(x.dtype).split(scales), col_filters.to(x.dtype).split(scales), strict=True)
    return _pyramid([rows @ x @ cols.t() for rows, cols in filters])


def cascade(x: Tensor, scales: Sequence[int]) -> Tensor:
    """Repeated avg_pool2d: the finest scale from the map, each other scale from the next finer one."""
    grids = {}
    for scale in sorted(scales, reverse=True):
        if any(side % scale for side in x.shape[2:]):
            raise NotImplementedError(
                f"avg_pool2d needs windows of equal size, but {_sides(x)} is not a multiple of {scale} x {scale}"
            )
        x = F.avg_pool2d(x, (x.shape[2] // scale, x.shape[3] // scale))
        grids[scale] = x
    return _pyramid([grids[scale] for scale in scales])


def pool_by_halving(x: Tensor, scales: Sequence[int], halve: Callable[[Tensor], Tensor]) -> Tensor:
    """Repeated blur pooling, which halves the sides, and from its results the requested maps."""
    height, width = x.shape[2:]
    for scale in scales:
        if height != width or height % scale or (height // scale).bit_count() != 1:
            raise NotImplementedError(
                f"blur pooling halves both sides, but {_sides(x)} does not halve down to {scale} x {scale}"
            )
    maps = [x]
    while maps[-1].shape[2] > min(scales):
        maps.append(halve(maps[-1]))
    grids = {grid.shape[2]: grid for grid in maps}
    return _pyramid([grids[scale] for scale in scales])


def stacked_averages(grid: Sequence[int], scales: Sequence[int]) -> Tensor:
    """The windows of `adaptive_avg_pool2d` as one matrix (cells, H * W), in float64."""
    units = (torch.eye(side, dtype=torch.float64)[None] for side in grid)
    rows, cols = (torch.cat([F.adaptive_avg_pool1d(unit, scale)[0].t() for scale in scales]) for unit in units)
    return stacked_filters(rows, cols, scales)


def stacked_filters(row_filters: Tensor, col_filters: Tensor, scales: Sequence[int]) -> Tensor:
    """The Kronecker products R_s x K_s of all scales as one matrix (cells, H * W)."""
    filters = zip(row_filters.split(scales), col_filters.split(scales), strict=True)
    return torch.cat([torch.kron(rows, cols) for rows, cols in filters])


def one_gemm(x: Tensor, matrix: Tensor) -> Tensor:
    """All scales of a contiguous map as one GEMM against the stacked filters (cells, H * W)."""
    return (x.flatten(2) @ matrix.to(x.dtype).t()).transpose(1, 2)


def one_gemm_channels_last(x: Tensor, matrix: Tensor) -> Tensor:
    """The same for a channels-last map, without a copy."""
    return matrix.to(x.dtype) @ x.permute(0, 2, 3, 1).flatten(1, 2)


def _pyramid(grids: Sequence[Tensor]) -> Tensor:
    return torch.cat([grid.flatten(2) for grid in grids], 2).transpose(1, 2)


def _sides(x: Tensor) -> str:
    return f"{x.shape[2]} x {x.shape[3]}"
