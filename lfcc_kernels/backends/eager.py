"""The reference backend: both ops in plain PyTorch, for any device and dtype, twice differentiable."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lfcc_kernels.backends.dtypes import accumulator


def lowpass(
    x: Tensor,
    scales: Sequence[int],
    row_filters: Tensor | None,
    col_filters: Tensor | None,
    grid: list[int],
    prefix_tokens: int,
) -> Tensor:
    """Y_s = R_s F K_s^T for every scale, one read of the map per scale. Arguments as in `lfcc::lowpass`."""
    with torch.autocast(x.device.type, enabled=False):
        maps = x.to(accumulator(x.dtype))
        if x.dim() == 3:
            maps = maps[:, prefix_tokens:].unflatten(1, grid).permute(0, 3, 1, 2)
        if row_filters is None or col_filters is None:
            pooled = [F.adaptive_avg_pool2d(maps, s) for s in scales]
        else:
            stacks = zip(row_filters.split(scales), col_filters.split(scales), strict=True)
            pooled = [rows @ maps @ cols.t() for rows, cols in stacks]
        return torch.cat([y.flatten(2) for y in pooled], dim=2).transpose(1, 2).contiguous().to(x.dtype)


def info_nce(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    positive_offset: int,
    symmetric: bool,
    normalize: bool,
    mean: bool,
) -> Tensor:
    """Loss of each row (B,), or their mean; allocates the B x K logits. Arguments as in `lfcc::info_nce`."""
    with torch.autocast(student.device.type, enabled=False):
        queries, keys = student.to(accumulator(student.dtype)), teacher.to(accumulator(teacher.dtype))
        if normalize:
            queries, keys = _unit_rows(queries), _unit_rows(keys)
        logits = queries @ keys.t() / temperature.to(queries)
        rows = torch.arange(len(queries), device=student.device)
        positives = rows + positive_offset
        if student_ids is not None and teacher_ids is not None:
            excluded = student_ids[:, None] == teacher_ids[None, :]
            excluded[rows, positives] = False
            logits = logits.masked_fill(excluded, -torch.inf)
        losses = F.cross_entropy(logits, positives, reduction="none")
        if symmetric:
            columns = logits[:, positive_offset : positive_offset + len(queries)]
            losses = (losses + F.cross_entropy(columns.t(), rows, reduction="none")) / 2
        return losses.mean() if mean else losses


def _unit_rows(rows: Tensor) -> Tensor:
    """F.normalize after scaling down rows with values above 1, whose squares could overflow."""
    return F.normalize(rows / rows.detach().abs().amax(1, keepdim=True).clamp(min=1), dim=1)
