"""`LowPassPyramid` and its filter banks: modules that compute the matrices R_s and K_s of `lowpass` for a map size.

`forward(height, width)` of a bank returns (row_filters (sum of s, H), col_filters (sum of s, W)), or (None, None) for
the average, which the kernels compute without matrices. Banks do not depend on the map size.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfcc_kernels._checks import FeatureMap, check_fit, check_map, check_scales
from lfcc_kernels.backends.dtypes import accumulator
from lfcc_kernels.functional import lowpass_of_maps

Filters = tuple[Tensor, Tensor] | tuple[None, None]


class Average(nn.Module):
    """1/|w| on the adaptive window w = [floor(i n / s), ceil((i + 1) n / s)), as in `adaptive_avg_pool2d`."""

    def __init__(self, scales: tuple[int, ...]) -> None:
        super().__init__()

    def forward(self, height: int, width: int) -> Filters:
        return None, None


class Learnable(nn.Module):
    """Softmax over the adaptive window of `TAPS` trainable logits per window and axis.

    The logits are resampled linearly (as by `F.interpolate(mode="linear")`) to the cells of the window. Zero logits,
    the initial values, give the average. Every row sums to one, so the filter has unit gain at zero frequency.
    """

    TAPS = 8

    def __init__(self, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.scales = scales
        self.row_logits = nn.Parameter(torch.zeros(sum(scales), self.TAPS))
        self.col_logits = nn.Parameter(torch.zeros(sum(scales), self.TAPS))

    def forward(self, height: int, width: int) -> Filters:
        return self._filters(self.row_logits, height), self._filters(self.col_logits, width)

    def _filters(self, logits: Tensor, size: int) -> Tensor:
        size = len(range(size))  # an int also if torch.compile traces a symbol, which it does from a second map size on
        resample, outside = _resampling(self.scales, size, self.TAPS, logits.device)
        # A product and a sum, because autocast would compute a matrix product in bfloat16.
        at_cells = (resample.to(logits.dtype) * logits[:, None, :]).sum(2)
        return at_cells.masked_fill(outside, -torch.inf).softmax(1)


class Gaussian(nn.Module):
    """exp(-(h - c)^2 / (2 sigma^2)) around the centre c of each output cell; every row is normalised to sum to one.

    sigma is exp(log_width) output cells, with one trainable log_width per scale for both axes, initially half a cell.
    """

    def __init__(self, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.scales = scales
        self.log_width = nn.Parameter(torch.full((len(scales),), math.log(0.5)))

    def forward(self, height: int, width: int) -> Filters:
        return self._filters(height), self._filters(width)

    def _filters(self, size: int) -> Tensor:
        centres = torch.arange(size, device=self.log_width.device) + 0.5
        rows = []
        for scale, width in zip(self.scales, self.log_width.exp(), strict=True):
            cells = torch.arange(scale, device=self.log_width.device)[:, None] + 0.5
            distance = (centres * scale / size - cells) / width  # in output cells
            rows.append((-0.5 * distance.square()).softmax(1))
        return torch.cat(rows)


class DCT(nn.Module):
    """The first s rows of the orthonormal DCT-II of each side, for every scale s."""

    reference: Tensor

    def __init__(self, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.scales = scales
        self.register_buffer("reference", torch.empty(0), persistent=False)  # follows .to(device)

    def forward(self, height: int, width: int) -> Filters:
        return self._filters(height), self._filters(width)

    def _filters(self, size: int) -> Tensor:
        frequency = torch.arange(max(self.scales), device=self.reference.device, dtype=torch.float64)[:, None]
        centres = torch.arange(size, device=self.reference.device, dtype=torch.float64) + 0.5
        basis = torch.cos(math.pi / size * frequency * centres) * math.sqrt(2 / size)
        basis[0] /= math.sqrt(2)
        return torch.cat([basis[:scale] for scale in self.scales])


BANKS = {"average": Average, "learnable": Learnable, "gaussian": Gaussian, "dct": DCT}


class LowPassPyramid(nn.Module):
    """Low-pass a feature map at several scales with a filter bank.

    Args:
        scales: Sizes of the output grids, s x s each.
        filter: "average" (adaptive windows), "learnable" (trainable weights within those windows, initialised to the
            average), "gaussian" (trainable width) or "dct" (the first s x s coefficients of the DCT-II).

    Raises:
        TypeError: `scales` is not a sequence of ints.
        ValueError: `scales` has no entry or one below 1, or `filter` is unknown.
    """

    def __init__(self, scales: Sequence[int] = (1, 2, 4), filter: str = "average") -> None:
        super().__init__()
        if filter not in BANKS:
            raise ValueError(f"LowPassPyramid: filter is {filter!r}; expected one of {', '.join(BANKS)}")
        self.scales = check_scales("LowPassPyramid", scales)
        self.bank = BANKS[filter](self.scales)

    def forward(self, x: Tensor, *, grid: tuple[int, int] | None = None, prefix_tokens: int = 0) -> Tensor:
        """Low-pass one map.

        Args:
            x: Map (B, C, H, W) or tokens (B, N, C), as for `lowpass`.
            grid: (H, W) of tokens, as for `lowpass`.
            prefix_tokens: Number of class and register tokens, as for `lowpass`.

        Returns:
            Tensor (B, cells, C) in the dtype of `x`, with cells = sum of s * s.
        """
        feature_map = check_map("LowPassPyramid: x", x, grid, prefix_tokens)
        check_fit(feature_map, self.scales)
        filters = self.filters_of(feature_map)
        return lowpass_of_maps([feature_map], self.scales, None if filters is None else [filters])[0]

    def filters_of(self, feature_map: FeatureMap) -> tuple[Tensor, Tensor] | None:
        """(row_filters, col_filters) of the bank for a map, as for `lowpass`; None for the average."""
        row_filters, col_filters = self.bank(feature_map.height, feature_map.width)
        if row_filters is None or col_filters is None:
            return None
        dtype = accumulator(feature_map.x.dtype)
        return row_filters.to(dtype), col_filters.to(dtype)


@torch.compiler.assume_constant_result
def _resampling(scales: tuple[int, ...], size: int, taps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrices (S, size, taps) of the linear resampling, and a mask (S, size) of the cells outside each window."""
    key = (scales, size, taps, device)
    if key not in _RESAMPLING:
        resample = torch.zeros(sum(scales), size, taps)
        outside = torch.ones(sum(scales), size, dtype=torch.bool)
        for row, (index, scale) in enumerate((i, s) for s in scales for i in range(s)):
            start, stop = index * size // scale, -(-(index + 1) * size // scale)  # the adaptive window
            at_cells = F.interpolate(torch.eye(taps)[None], stop - start, mode="linear")[0]
            resample[row, start:stop] = at_cells.t()
            outside[row, start:stop] = False
        _RESAMPLING[key] = resample.to(device), outside.to(device)
    return _RESAMPLING[key]


_RESAMPLING: dict[tuple, tuple[Tensor, Tensor]] = {}
