"""References of the tests: both ops as loops, both ops in plain torch, and the bound on errors.

This file does not use the package. The loops are the definition. They are slow, so `test_reference.py` compares plain
torch with them, and plain torch in float64 is the reference of the kernels. In the dtype of the inputs, with the
accumulator dtype of the kernels, plain torch also gives the error to expect.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def loop_lowpass(
    x: Tensor, scales: Sequence[int], row_filters: Tensor | None = None, col_filters: Tensor | None = None
) -> Tensor:
    """(B, C, H, W) -> (B, cells, C) in float64, cell by cell, each a weighted sum over the map."""
    rows = window_means(scales, x.shape[2]) if row_filters is None else row_filters.double()
    cols = window_means(scales, x.shape[3]) if col_filters is None else col_filters.double()
    cells, offset = [], 0
    for scale in scales:
        for i in range(offset, offset + scale):
            for j in range(offset, offset + scale):
                cells.append((x.double() * rows[i, :, None] * cols[j]).sum((2, 3)))
        offset += scale
    return torch.stack(cells, dim=1)


def window_means(scales: Sequence[int], size: int) -> Tensor:
    """The windows of the average as matrices (sum of scales, size)."""
    rows = []
    for scale in scales:
        for i in range(scale):
            start, stop = math.floor(i * size / scale), math.ceil((i + 1) * size / scale)
            rows.append([1 / (stop - start) if start <= h < stop else 0.0 for h in range(size)])
    return torch.tensor(rows, dtype=torch.float64)


def torch_lowpass(
    x: Tensor, scales: Sequence[int], row_filters: Tensor | None = None, col_filters: Tensor | None = None
) -> Tensor:
    """The same in plain torch, in float32 (float64 for float64), rounded once at the end."""
    maps, pooled, offset = x.to(accumulator(x.dtype)), [], 0
    for scale in scales:
        if row_filters is None or col_filters is None:
            y = F.adaptive_avg_pool2d(maps, scale)
        else:
            rows, cols = (filters[offset : offset + scale] for filters in (row_filters, col_filters))
            y = torch.einsum("ih,bchw,jw->bcij", rows, maps, cols)
        pooled.append(y.flatten(2))
        offset += scale
    return torch.cat(pooled, dim=2).transpose(1, 2).to(x.dtype)


def loop_info_nce(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    direction: str = "student_to_teacher",
    student_ids: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    positive_offset: int = 0,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The loss in float64, row by row (and column by column)."""
    batch, keys = len(student), len(teacher)
    student, teacher = _rows(student, normalize), _rows(teacher, normalize)
    own_ids, key_ids = ([] if ids is None else ids.tolist() for ids in (student_ids, teacher_ids))
    if isinstance(temperature, Tensor):
        temperature = temperature.double()

    def kept(i: int, j: int) -> bool:
        return not own_ids or j == positive_offset + i or own_ids[i] != key_ids[j]

    losses = []
    for i in range(batch):
        positive = positive_offset + i
        ways = []
        if direction != "teacher_to_student":
            logits = teacher @ student[i] / temperature
            ways.append(logits[[j for j in range(keys) if kept(i, j)]].logsumexp(0) - logits[positive])
        if direction != "student_to_teacher":
            logits = student @ teacher[positive] / temperature
            ways.append(logits[[k for k in range(batch) if kept(k, positive)]].logsumexp(0) - logits[i])
        losses.append(sum(ways) / len(ways))
    return torch.stack(losses).mean() if reduction == "mean" else torch.stack(losses)


def _rows(side: Tensor, normalize: bool) -> Tensor:
    rows = side.double().unbind(0)
    return torch.stack([row / row.norm().clamp_min(1e-12) if normalize else row for row in rows])


def torch_info_nce(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    direction: str = "student_to_teacher",
    student_ids: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    positive_offset: int = 0,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The same in plain torch, in float32 (float64 for float64), with all logits."""
    dtype = accumulator(student.dtype)
    queries, keys = student.to(dtype), teacher.to(dtype)
    if normalize:
        queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    logits = queries @ keys.t() / (temperature.to(dtype) if isinstance(temperature, Tensor) else temperature)
    rows = torch.arange(len(queries))
    if student_ids is not None and teacher_ids is not None:
        left_out = student_ids[:, None] == teacher_ids[None, :]
        left_out[rows, positive_offset + rows] = False
        logits = logits.masked_fill(left_out, -torch.inf)
    along_rows = F.cross_entropy(logits, positive_offset + rows, reduction=reduction)
    positives = logits[:, positive_offset : positive_offset + len(queries)]
    along_columns = F.cross_entropy(positives.t(), rows, reduction=reduction)
    both = {"student_to_teacher": along_rows, "teacher_to_student": along_columns}
    return both.get(direction, (along_rows + along_columns) / 2)


def assert_close_to_truth(
    result: Tensor, same_dtype_torch: Tensor, truth: Tensor, *, factor: float, floor: float
) -> None:
    """The largest error of `result` is at most `factor` times that of torch in the same dtype, plus `floor`.

    The floor is an absolute error of a few roundings of the largest value in the computation, for cases in which torch
    happens to be exact. It is 16 times larger in float64, in which torch is the reference itself.
    """
    assert result.shape == same_dtype_torch.shape == truth.shape
    assert result.dtype == same_dtype_torch.dtype, f"dtype is {result.dtype}, torch's is {same_dtype_torch.dtype}"
    error, torch_error = ((got.double() - truth).abs().max().item() for got in (result, same_dtype_torch))
    bound = factor * torch_error + floor * (16 if result.dtype == torch.float64 else 1)
    assert error <= bound, f"error {error:.3e} is over {bound:.3e}, {factor} * {torch_error:.3e} + floor"


def rounding(dtype: torch.dtype, of: float | Tensor) -> float:
    """One unit in the last place of a number, or of the largest number in a tensor."""
    return torch.finfo(dtype).eps * (of.abs().max().item() if isinstance(of, Tensor) else of)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_float64(*inputs: Tensor | None) -> list[Tensor | None]:
    """Copies in float64, which require gradients if the originals do."""
    return [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


def gradients(output: Tensor, inputs: Sequence[Tensor | None], upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    """Gradients of those inputs that require them."""
    return torch.autograd.grad(output, [x for x in inputs if x is not None and x.requires_grad], upstream)
