"""`lfcc::info_nce_group`: many small pairs with the same rows and keys at once, student_to_teacher, teachers frozen.

Only Triton has it: on a GPU the launches of a small pair cost more than its work, on a CPU a pair is one call.
Gradients are of each row's own loss, as in `lfcc::info_nce_one_pass`, of all pairs side by side.
"""

import torch
from torch import Tensor

from lfcc_kernels.ops.dispatch import select
from lfcc_kernels.ops.info_nce import info_nce
from lfcc_kernels.ops.registration import call, define, first_order_only, op, register_autograd, register_fake

BACKENDS = ("triton",)
SCHEMAS = [
    "info_nce_group(Tensor[] students, Tensor[] teachers, Tensor temperature, Tensor? student_ids, "
    "Tensor? teacher_ids, int positive_offset, bool normalize) "
    "-> (Tensor losses, Tensor student_grads, Tensor temperature_grads, Tensor columns)",
]
define(SCHEMAS, "info_nce_group", BACKENDS)


def info_nce_group(
    students: list[Tensor],
    teachers: list[Tensor],
    temperature: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    positive_offset: int,
    direction: str,
    normalize: bool,
) -> Tensor:
    """Mean loss of each pair (pairs,): at once where a backend can and it pays, else one after the other."""
    if _at_once(students, teachers, direction):
        if temperature.requires_grad:
            temperature = temperature.to(students[0].device)
        return call(
            op("info_nce_group", "triton"),
            students, teachers, temperature, student_ids, teacher_ids, positive_offset, normalize,
        )[0]  # fmt: skip
    ids = student_ids, teacher_ids
    return torch.stack([
        info_nce(student, teacher, temperature, *ids, positive_offset, direction, normalize, mean=True)
        for student, teacher in zip(students, teachers, strict=True)
    ])  # fmt: skip


def _at_once(students: list[Tensor], teachers: list[Tensor], direction: str) -> bool:
    first = students[0]
    pairs_of_rows = sum(s.shape[0] * t.shape[0] for s, t in zip(students, teachers, strict=True))
    if select("info_nce", first.device, first.dtype, pairs_of_rows) not in BACKENDS or first.dtype == torch.float64:
        return False
    if direction != "student_to_teacher" or not torch.is_grad_enabled():
        return False
    alike = all(s.dtype == first.dtype and s.shape[0] == first.shape[0] for s in students)
    alike = alike and all(t.shape[0] == teachers[0].shape[0] for t in teachers)
    return alike and any(s.requires_grad for s in students) and not any(t.requires_grad for t in teachers)


@register_fake("info_nce_group", BACKENDS)
def _(students, teachers, temperature, student_ids, teacher_ids, positive_offset, normalize):
    first, width = students[0], sum(student.shape[1] for student in students)
    numbers = first.new_empty(len(students), first.shape[0], dtype=torch.float32)
    columns = first.new_empty(width, dtype=torch.int64)
    return numbers.new_empty(len(students)), numbers.new_empty(first.shape[0], width), numbers, columns


def _setup_context(ctx, inputs, output):
    students, _teachers, temperature, *_ = inputs
    _losses, student_grads, temperature_grads, columns = output
    ctx.widths, ctx.dtype = [student.shape[1] for student in students], students[0].dtype
    ctx.mark_non_differentiable(student_grads, temperature_grads, columns)
    ctx.save_for_backward(*students, temperature, student_grads, temperature_grads, columns)


def _backward(_backend, ctx, grad, *_):
    *students, temperature, student_grads, temperature_grads, columns = ctx.saved_tensors
    inputs = [grad, *students, temperature]
    with torch.no_grad():
        of_rows = grad / student_grads.shape[0]
        of_all = (student_grads * of_rows[columns]).to(ctx.dtype)
        to_students = list(of_all.split(ctx.widths, dim=1))
        to_temperature = None
        if ctx.needs_input_grad[2]:
            to_temperature = (temperature_grads.sum(1) * of_rows).sum().to(temperature)
    return (
        [first_order_only(to_student, inputs) for to_student in to_students],
        [None] * len(to_students),
        first_order_only(to_temperature, inputs),
        None, None, None, None,
    )  # fmt: skip


register_autograd("info_nce_group", _setup_context, _backward, BACKENDS)
