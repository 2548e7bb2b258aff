"""`lfcc::info_nce`, its one-pass form, its gradients and its list form: fakes, autograd formulas, choice of backend.

The ops know two directions: rows (student_to_teacher) and symmetric. teacher_to_student is rows with the roles
exchanged: the B positive teacher rows are the queries, the student rows the keys. Which op runs:

    no gradient, or symmetric   info_nce            2 B K D FLOPs, then info_nce_grad, 4 B K D per side
    rows, gradient of student   info_nce_one_pass   4 B K D FLOPs for loss and student gradient together
    rows, and of teacher        the same, then info_nce_grad for the teacher's side, 4 B K D

Gradients of the one-pass form are those of each row's own loss; backward multiplies them by the upstream gradient.
`lfcc_kernels.functional` validates the arguments; the kernels trust them.

`lfcc::info_nce_foreach` takes a list of pairs (student_to_teacher, frozen teacher). Only Triton implements it: on a
GPU the launches of a small pair cost more than its work. Its gradients are per row too, concatenated over the pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lfcc_kernels.backends import eager
from lfcc_kernels.backends.dtypes import accumulator
from lfcc_kernels.backends.schemas import BACKENDS
from lfcc_kernels.ops.dispatch import select
from lfcc_kernels.ops.registration import call, once_differentiable, op, register_autograd, register_fake


class Contrast(NamedTuple):
    """Validated arguments of a contrast. The first six are the first six of the ops' schemas."""

    student: Tensor  # (B, D)
    teacher: Tensor  # (K, D)
    temperature: Tensor  # 0-d
    student_ids: Tensor | None  # (B,) int64
    teacher_ids: Tensor | None  # (K,) int64
    positive_offset: int
    direction: str
    normalize: bool
    mean: bool  # over the rows; otherwise one loss per row

    def roles_exchanged(self) -> "Contrast":
        """teacher_to_student as student_to_teacher: the B positive teacher rows contrasted with the student rows."""
        teacher, teacher_ids = self.teacher, self.teacher_ids
        if teacher.shape[0] != self.student.shape[0]:
            positives = slice(self.positive_offset, self.positive_offset + self.student.shape[0])
            teacher = teacher[positives]
            teacher_ids = None if teacher_ids is None else teacher_ids[positives]
        return Contrast(
            teacher, self.student, self.temperature, teacher_ids, self.student_ids, 0, "student_to_teacher",
            self.normalize, self.mean,
        )  # fmt: skip


def info_nce(contrast: Contrast) -> Tensor:
    """Loss of each row (B,), or their mean, by the selected backend and the cheapest op for the gradients needed."""
    if contrast.direction == "teacher_to_student":
        contrast = contrast.roles_exchanged()
    student, teacher, temperature, student_ids, teacher_ids, positive_offset, direction, normalize, mean = contrast
    symmetric = direction == "symmetric"
    if temperature.requires_grad:
        temperature = temperature.to(student.device)  # where the kernels compute its gradient
    pair = (student, teacher, temperature, student_ids, teacher_ids, positive_offset)
    backend = select("info_nce", student.device, student.dtype, student.shape[0] * teacher.shape[0])
    if backend == "eager":
        return eager.info_nce(*pair, symmetric, normalize, mean)
    if not symmetric and torch.is_grad_enabled() and (student.requires_grad or temperature.requires_grad):
        return op("info_nce_one_pass", backend)(*pair, normalize, mean)[0]
    return call(op("info_nce", backend), *pair, symmetric, normalize, mean)[0]


@register_fake("info_nce")
def _(student, teacher, temperature, student_ids, teacher_ids, positive_offset, symmetric, normalize, mean):
    row_stats = student.new_empty(student.shape[0], dtype=accumulator(student.dtype))
    loss = row_stats.new_empty(() if mean else row_stats.shape)
    return loss, row_stats, row_stats.new_empty(student.shape[0] if symmetric else 0)


@register_fake("info_nce_one_pass")
def _(student, teacher, temperature, student_ids, teacher_ids, positive_offset, normalize, mean):
    row_stats = student.new_empty(student.shape[0], dtype=accumulator(student.dtype))
    loss = row_stats.new_empty(() if mean else row_stats.shape)
    return loss, row_stats, row_stats.new_empty(student.shape), torch.empty_like(row_stats)


@register_fake("info_nce_grad")
def _(
    grad, student, teacher, temperature, student_ids, teacher_ids, positive_offset, symmetric, normalize,
    row_lse, col_lse, of_teacher,
):  # fmt: skip
    side = teacher if of_teacher else student
    return side.new_empty(side.shape), torch.empty_like(temperature)


def _row_grads(ctx, grad: Tensor, rows: int) -> Tensor:
    """The upstream gradient of each row's loss."""
    return (grad / rows).expand(rows) if ctx.mean else grad


def _setup_rows(ctx, inputs, output):
    *pair, ctx.positive_offset, ctx.normalize, ctx.mean = inputs
    _loss, row_lse, student_grad, temperature_grad = output
    ctx.mark_non_differentiable(row_lse, student_grad, temperature_grad)
    ctx.save_for_backward(*pair, row_lse, student_grad, temperature_grad)


def _backward_rows(backend, ctx, grad, *_):
    student, teacher, temperature, *ids, row_lse, student_grad, temperature_grad = ctx.saved_tensors
    inputs = [grad, student, teacher, temperature]
    grad_student = grad_teacher = grad_temperature = None
    with torch.no_grad():
        row_grads = _row_grads(ctx, grad, student.shape[0])
        if ctx.needs_input_grad[0]:
            grad_student = (student_grad * row_grads[:, None]).to(student.dtype)
        if ctx.needs_input_grad[1]:
            grad_teacher, _ = op("info_nce_grad", backend)(
                row_grads, student, teacher, temperature, *ids, ctx.positive_offset, False, ctx.normalize,
                row_lse, row_lse.new_empty(0), True,
            )  # fmt: skip
        if ctx.needs_input_grad[2]:
            grad_temperature = (temperature_grad * row_grads).sum().to(temperature)
    return (
        once_differentiable(grad_student, inputs),
        once_differentiable(grad_teacher, inputs),
        once_differentiable(grad_temperature, inputs),
        None, None, None, None, None,
    )  # fmt: skip


def _setup_both(ctx, inputs, output):
    *pair, ctx.positive_offset, ctx.symmetric, ctx.normalize, ctx.mean = inputs
    _loss, row_lse, col_lse = output
    ctx.mark_non_differentiable(row_lse, col_lse)
    ctx.save_for_backward(*pair, row_lse, col_lse)


def _backward_both(backend, ctx, grad, *_):
    student, teacher, temperature, *ids, row_lse, col_lse = ctx.saved_tensors
    inputs = [grad, student, teacher, temperature]

    def gradients(of_teacher: bool) -> tuple[Tensor, Tensor]:
        return op("info_nce_grad", backend)(
            _row_grads(ctx, grad, student.shape[0]), student, teacher, temperature, *ids, ctx.positive_offset,
            ctx.symmetric, ctx.normalize, row_lse, col_lse, of_teacher,
        )  # fmt: skip

    grad_student = grad_teacher = grad_temperature = None
    with torch.no_grad():
        # Each side's pass also computes the gradient of the temperature, so one pass is enough for it.
        if ctx.needs_input_grad[0] or (ctx.needs_input_grad[2] and not ctx.needs_input_grad[1]):
            grad_student, grad_temperature = gradients(of_teacher=False)
        if ctx.needs_input_grad[1]:
            grad_teacher, grad_temperature = gradients(of_teacher=True)
    return (
        once_differentiable(grad_student if ctx.needs_input_grad[0] else None, inputs),
        once_differentiable(grad_teacher, inputs),
        once_differentiable(grad_temperature if ctx.needs_input_grad[2] else None, inputs),
        None, None, None, None, None, None,
    )  # fmt: skip


register_autograd("info_nce_one_pass", _setup_rows, _backward_rows)
register_autograd("info_nce", _setup_both, _backward_both)


def info_nce_foreach(contrasts: Sequence[Contrast]) -> Tensor:
    """Mean loss of each contrast (pairs,): one op if the list form applies, otherwise one op per contrast.

    The contrasts may differ in nothing but their rows.
    """
    if _batched(contrasts):
        first, temperature = contrasts[0], contrasts[0].temperature
        if temperature.requires_grad:
            temperature = temperature.to(first.student.device)
        return call(
            op("info_nce_foreach", "triton"),
            [contrast.student for contrast in contrasts],
            [contrast.teacher for contrast in contrasts],
            temperature,
            first.student_ids,
            first.teacher_ids,
            first.positive_offset,
            first.normalize,
        )[0]
    return torch.stack([info_nce(contrast) for contrast in contrasts])


def _batched(contrasts: Sequence[Contrast]) -> bool:
    """Whether the list form runs: student_to_teacher with a frozen teacher, rows of one dtype and equal numbers."""
    students, teachers = [contrast.student for contrast in contrasts], [contrast.teacher for contrast in contrasts]
    first = students[0]
    pairs_of_rows = sum(s.shape[0] * t.shape[0] for s, t in zip(students, teachers, strict=True))
    backend = select("info_nce", first.device, first.dtype, pairs_of_rows)
    if backend not in BACKENDS["info_nce_foreach"] or first.dtype == torch.float64:
        return False
    if contrasts[0].direction != "student_to_teacher" or not torch.is_grad_enabled():
        return False
    alike = all(s.dtype == first.dtype and s.shape[0] == first.shape[0] for s in students)
    alike = alike and all(t.shape[0] == teachers[0].shape[0] for t in teachers)
    return alike and any(s.requires_grad for s in students) and not any(t.requires_grad for t in teachers)


@register_fake("info_nce_foreach")
def _(students, teachers, temperature, student_ids, teacher_ids, positive_offset, normalize):
    first, width = students[0], sum(student.shape[1] for student in students)
    temperature_grads = first.new_empty(len(students), first.shape[0], dtype=torch.float32)
    losses = temperature_grads.new_empty(len(students))
    student_grads = temperature_grads.new_empty(first.shape[0], width)
    return losses, student_grads, temperature_grads, first.new_empty(width, dtype=torch.int64)


def _setup_foreach(ctx, inputs, output):
    students, _teachers, temperature, *_ = inputs
    _losses, student_grads, temperature_grads, columns = output
    ctx.widths, ctx.dtype = [student.shape[1] for student in students], students[0].dtype
    ctx.mark_non_differentiable(student_grads, temperature_grads, columns)
    ctx.save_for_backward(*students, temperature, student_grads, temperature_grads, columns)


def _backward_foreach(_backend, ctx, grad, *_):
    *students, temperature, student_grads, temperature_grads, columns = ctx.saved_tensors
    inputs = [grad, *students, temperature]
    with torch.no_grad():
        pair_grads = grad / student_grads.shape[0]  # of each row's loss, one per pair
        all_grads = (student_grads * pair_grads[columns]).to(ctx.dtype)
        grad_students = list(all_grads.split(ctx.widths, dim=1))
        grad_temperature = None
        if ctx.needs_input_grad[2]:
            grad_temperature = (temperature_grads.sum(1) * pair_grads).sum().to(temperature)
    return (
        [once_differentiable(grad_student, inputs) for grad_student in grad_students],
        [None] * len(grad_students),
        once_differentiable(grad_temperature, inputs),
        None, None, None, None,
    )  # fmt: skip


register_autograd("info_nce_foreach", _setup_foreach, _backward_foreach)
