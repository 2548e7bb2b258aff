"""The ops of `lfcc_kernels/ops/info_nce.py` in Triton, by one of two algorithms:

    fused    many narrow rows: nothing of size B x K is stored, `info_nce_fused.py`
    chunks   wide or few rows: the library multiplies rows chunk by chunk, `info_nce_chunks.py`

`pack` selects the algorithm by the crossovers of the table (`tiles.py`). Nothing synchronises with the GPU and no
allocation depends on data, so both can be captured in a CUDA graph.
"""

from types import ModuleType

import torch
from torch import Tensor

from lfcc_kernels.backends.triton import info_nce_chunks, info_nce_fused, runtime
from lfcc_kernels.backends.triton.info_nce_rows import Pair, Upstream, epilogue, pack


def info_nce(
    student: Tensor, teacher: Tensor, temperature: Tensor, student_ids: Tensor | None, teacher_ids: Tensor | None,
    positive_offset: int, symmetric: bool, normalize: bool, mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, log-sum-exps of the rows and, if symmetric, of the positives' columns."""
    with runtime.on_device(student):
        pair = pack(student, teacher, temperature, student_ids, teacher_ids, positive_offset, normalize)
        losses, row_lse, col_lse = algorithm(pair).forward(pair, symmetric)
        return losses.mean() if mean else losses, row_lse, col_lse


def info_nce_one_pass(
    student: Tensor, teacher: Tensor, temperature: Tensor, student_ids: Tensor | None, teacher_ids: Tensor | None,
    positive_offset: int, normalize: bool, mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss and log-sum-exps of the rows, and the gradient of each row's own loss for the row and the temperature."""
    with runtime.on_device(student):
        pair = pack(student, teacher, temperature, student_ids, teacher_ids, positive_offset, normalize)
        losses, row_lse, acc, temperature_grad = algorithm(pair).one_pass(pair)
        student_grad = pair.new_stats(*student.shape)
        epilogue(pair, acc, False, None, student_grad)
        return losses.mean() if mean else losses, row_lse, student_grad, temperature_grad


def info_nce_grad(
    grad: Tensor, student: Tensor, teacher: Tensor, temperature: Tensor, student_ids: Tensor | None,
    teacher_ids: Tensor | None, positive_offset: int, symmetric: bool, normalize: bool, row_lse: Tensor,
    col_lse: Tensor, of_teacher: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of sum_i grad_i L_i for the rows of one side and for the temperature."""
    with runtime.on_device(student):
        pair = pack(student, teacher, temperature, student_ids, teacher_ids, positive_offset, normalize)
        grad = grad.contiguous()
        # float16 weights are divided by the largest upstream gradient, which may have any magnitude.
        grad_absmax = grad.abs().max().clamp(min=2.0**-100) if pair.loss_scale != 1 else None
        lse = row_lse.contiguous(), col_lse.contiguous()
        acc, dtau = algorithm(pair).gradient(pair, Upstream(grad, *lse, grad_absmax, symmetric, of_teacher))
        side_grad = student.new_empty((teacher if of_teacher else student).shape)
        epilogue(pair, acc, of_teacher, grad_absmax, side_grad)
        if temperature.device != grad.device:  # a constant: ops/info_nce.py moves a learned temperature to the GPU
            return side_grad, torch.zeros_like(temperature)
        return side_grad, dtau.sum().to(temperature.dtype)


def algorithm(pair: Pair) -> ModuleType:
    """The module with `forward`, `one_pass` and `gradient` for this pair."""
    return info_nce_fused if pair.fused else info_nce_chunks
