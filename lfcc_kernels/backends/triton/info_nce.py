"""The ops of `lfcc_kernels/ops/info_nce.py` in Triton, each in one of two ways.

    fused    narrow rows, many of them: nothing of size B x K in memory, `info_nce_fused.py`
    chunks   wide rows, or few: the library multiplies rows chunk by chunk, `info_nce_chunks.py`

The crossover is a line of the table (`tiles.py`). Nothing waits for the GPU, and no allocation depends on data, so
that both can be captured in a CUDA graph.
"""

from types import ModuleType

import torch
import triton
from torch import Tensor

from lfcc_kernels.backends.triton import info_nce_chunks, info_nce_fused, runtime
from lfcc_kernels.backends.triton.info_nce_rows import Pair, finish, pack
from lfcc_kernels.backends.triton.tiles import table


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-sum-exps of the rows and, where symmetric, of the positives' columns."""
    with runtime.on_device(student):
        way, pair = packed(student, teacher, temperature, student_ids, teacher_ids, positive_offset, normalize)
        losses, row_lse, col_lse = way.statistics(pair, symmetric)
        return losses.mean() if mean else losses, row_lse, col_lse


def info_nce_one_pass(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    positive_offset: int,
    normalize: bool,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-sum-exps of the rows, and of each row's own loss the gradient of the row and of the temperature."""
    with runtime.on_device(student):
        way, pair = packed(student, teacher, temperature, student_ids, teacher_ids, positive_offset, normalize)
        losses, row_lse, sums, temperature_grad = way.one_pass(pair)
        student_grad = pair.numbers(*student.shape)
        finish(pair, sums, False, None, student_grad)
        return losses.mean() if mean else losses, row_lse, student_grad, temperature_grad


def info_nce_grad(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    positive_offset: int,
    symmetric: bool,
    normalize: bool,
    row_lse: Tensor,
    col_lse: Tensor,
    of_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum_i grad_i L_i: of one side's rows, and of the temperature."""
    with runtime.on_device(student):
        way, pair = packed(student, teacher, temperature, student_ids, teacher_ids, positive_offset, normalize)
        grad = grad.contiguous()
        # Weights of float16 are taken relative to the largest upstream gradient, which may be of any size.
        magnitude = grad.abs().max().clamp(min=2.0**-100) if pair.gain != 1 else None
        lse = row_lse.contiguous(), col_lse.contiguous()
        sums, slopes = way.gradient(pair, grad, *lse, magnitude, symmetric, of_teacher)
        side_grad = student.new_empty((teacher if of_teacher else student).shape)
        finish(pair, sums, of_teacher, magnitude, side_grad)
        if temperature.device != grad.device:  # a constant: ops/info_nce.py brings one that learns to the GPU
            return side_grad, torch.zeros_like(temperature)
        return side_grad, slopes.sum().to(temperature.dtype)


def packed(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    positive_offset: int,
    normalize: bool,
) -> tuple[ModuleType, Pair]:
    """The way to go for rows of this size and number, and the rows packed for it."""
    crossovers = table(runtime.chip(student.device).capability)["fused"]
    limits = crossovers.get(str(student.element_size()))  # none for float64, which tensor cores have no tiles for
    tile = max(16, triton.next_power_of_2(student.shape[1]))
    fused = limits is not None and tile <= limits["widest"] and len(student) >= limits["fewest_rows"]
    padded = tile if fused else triton.cdiv(student.shape[1], 16) * 16
    pair = pack(student, teacher, temperature, student_ids, teacher_ids, positive_offset, normalize, padded)
    return info_nce_fused if fused else info_nce_chunks, pair
