"""The filter banks: each turns scales and a map's size into the matrices R_s and K_s of `lowpass`.

A bank's forward takes (height, width) and returns (row_filters (sum of s, H), col_filters (sum of s, W)), or
(None, None) for the average, which the kernels do without matrices. Banks hold no size, so one serves every
resolution.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Filters = tuple[Tensor, Tensor] | tuple[None, None]


class Average(nn.Module):
    """1/|w| on the adaptive window w = [floor(i n / s), ceil((i + 1) n / s)), as `adaptive_avg_pool2d`."""

    def __init__(self, scales: tuple[int, ...]) -> None:
        super().__init__()

    def forward(self, height: int, width: int) -> Filters:
        return None, None


class Learnable(nn.Module):
    """Softmax over the adaptive window of `TAPS` trainable logits a window and axis.

    The logits live on the window's normalised coordinate and are resampled linearly at the centres of its cells (as
    `F.interpolate(mode="linear")`). They start at zero, which is the average; every row sums to one, so the filter
    keeps unit gain at zero frequency and stays a low-pass.
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
        size = len(range(size))  # a number where torch.compile traces a symbol, from a second map size on
        resample, outside = _resampling(self.scales, size, self.TAPS, logits.device)
        # A product and a sum, not a matrix product: autocast would take that to bfloat16.
        at_cells = (resample.to(logits.dtype) * logits[:, None, :]).sum(2)
        return at_cells.masked_fill(outside, -torch.inf).softmax(1)


class Gaussian(nn.Module):
    """exp(-(h - c)^2 / (2 sigma^2)) about each cell's centre c, rows normalised to sum one.

    sigma is exp(log_width) output cells, one trainable log_width a scale for both axes, half a cell at the start.
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
            distance = (centres * scale / size - cells) / width  # in output cells, so sigma means the same on any map
            rows.append((-0.5 * distance.square()).softmax(1))
        return torch.cat(rows)


class DCT(nn.Module):
    """The first s rows of the orthonormal DCT-II of the side's length, for every scale s."""

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


def window(index: int, scale: int, size: int) -> tuple[int, int]:
    """Bounds [start, stop) of the adaptive window of output cell `index`."""
    return index * size // scale, -(-(index + 1) * size // scale)


@torch.compiler.assume_constant_result
def _resampling(scales: tuple[int, ...], size: int, taps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Linear resampling of taps at a side's cells (S, size, taps), and the cells outside each window (S, size)."""
    key = (scales, size, taps, device)
    if key not in _RESAMPLING:
        resample = torch.zeros(sum(scales), size, taps)
        outside = torch.ones(sum(scales), size, dtype=torch.bool)
        for row, (index, scale) in enumerate((i, s) for s in scales for i in range(s)):
            start, stop = window(index, scale, size)
            at_cells = F.interpolate(torch.eye(taps)[None], stop - start, mode="linear")[0]
            resample[row, start:stop] = at_cells.t()
            outside[row, start:stop] = False
        _RESAMPLING[key] = resample.to(device), outside.to(device)
    return _RESAMPLING[key]


_RESAMPLING: dict[tuple, tuple[Tensor, Tensor]] = {}
