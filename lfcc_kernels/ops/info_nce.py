"""`lfcc::info_nce`, its one-pass form and its gradients: schema, fake, autograd and choice of backend.

The ops know two directions: rows (student_to_teacher) and symmetric. teacher_to_student is rows with the roles
exchanged: the B positive teacher rows are the queries, the student rows the keys. Which form runs:

    no gradient, or symmetric   info_nce            2 B K D FLOPs, then info_nce_grad, 4 B K D a side
    rows, student learns        info_nce_one_pass   4 B K D FLOPs for loss and student gradient together
    rows, teacher learns too    the same, then info_nce_grad for the teacher's side, 4 B K D

Gradients of the one-pass form are of each row's own loss, so any upstream gradient is a product with them.
Arguments are checked in `lfcc_kernels.functional`; the kernels trust them.

`lfcc::info_nce_foreach` takes a list of pairs (student_to_teacher, frozen teacher). Only Triton implements it: on a
GPU the launches of a small pair cost more than its work. Its gradients are per row too, of all pairs side by side.
"""

import torch
from torch import Tensor

from lfcc_kernels.backends import eager
from lfcc_kernels.ops.dispatch import select
from lfcc_kernels.ops.registration import call, define, first_order_only, op, register_autograd, register_fake

_PAIR = (
    "Tensor student, Tensor teacher, Tensor temperature, Tensor? student_ids, Tensor? teacher_ids, int positive_offset"
)
SCHEMAS = [
    f"info_nce({_PAIR}, bool symmetric, bool normalize, bool mean) -> (Tensor loss, Tensor row_lse, Tensor col_lse)",
    f"info_nce_one_pass({_PAIR}, bool normalize, bool mean) "
    "-> (Tensor loss, Tensor row_lse, Tensor student_grad, Tensor temperature_grad)",
    f"info_nce_grad(Tensor grad, {_PAIR}, bool symmetric, bool normalize, Tensor row_lse, Tensor col_lse, "
    "bool of_teacher) -> (Tensor side_grad, Tensor temperature_grad)",
]
define(SCHEMAS, "info_nce")


def info_nce(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    positive_offset: int,
    direction: str,
    normalize: bool,
    mean: bool,
) -> Tensor:
    """Loss of each row (B,) or their mean, by the backend that serves and the cheapest form for what learns."""
    if direction == "teacher_to_student":
        if teacher.shape[0] != student.shape[0]:
            positives = slice(positive_offset, positive_offset + student.shape[0])
            teacher = teacher[positives]
            teacher_ids = None if teacher_ids is None else teacher_ids[positives]
        student, teacher, student_ids, teacher_ids = teacher, student, teacher_ids, student_ids
        positive_offset = 0
    symmetric = direction == "symmetric"
    if temperature.requires_grad:
        temperature = temperature.to(student.device)  # kernels give a gradient to none that lies elsewhere
    pair = (student, teacher, temperature, student_ids, teacher_ids, positive_offset)
    backend = select("info_nce", student.device, student.dtype, student.shape[0] * teacher.shape[0])
    if backend == "eager":
        return eager.info_nce(*pair, symmetric, normalize, mean)
    if not symmetric and torch.is_grad_enabled() and (student.requires_grad or temperature.requires_grad):
        return op("info_nce_one_pass", backend)(*pair, normalize, mean)[0]
    return call(op("info_nce", backend), *pair, symmetric, normalize, mean)[0]


@register_fake("info_nce")
def _(student, teacher, temperature, student_ids, teacher_ids, positive_offset, symmetric, normalize, mean):
    stats = student.new_empty(student.shape[0], dtype=eager.accumulator(student.dtype))
    loss = stats.new_empty(() if mean else stats.shape)
    return loss, stats, stats.new_empty(student.shape[0] if symmetric else 0)


@register_fake("info_nce_one_pass")
def _(student, teacher, temperature, student_ids, teacher_ids, positive_offset, normalize, mean):
    stats = student.new_empty(student.shape[0], dtype=eager.accumulator(student.dtype))
    loss = stats.new_empty(() if mean else stats.shape)
    return loss, stats, stats.new_empty(student.shape), torch.empty_like(stats)


@register_fake("info_nce_grad")
def _(
    grad, student, teacher, temperature, student_ids, teacher_ids, positive_offset, symmetric, normalize,
    row_lse, col_lse, of_teacher,
):  # fmt: skip
    side = teacher if of_teacher else student
    return side.new_empty(side.shape), torch.empty_like(temperature)


def _of_rows(ctx, grad: Tensor, rows: int) -> Tensor:
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
    to_student = to_teacher = to_temperature = None
    with torch.no_grad():
        of_rows = _of_rows(ctx, grad, student.shape[0])
        if ctx.needs_input_grad[0]:
            to_student = (student_grad * of_rows[:, None]).to(student.dtype)
        if ctx.needs_input_grad[1]:
            to_teacher, _ = op("info_nce_grad", backend)(
                of_rows, student, teacher, temperature, *ids, ctx.positive_offset, False, ctx.normalize,
                row_lse, row_lse.new_empty(0), True,
            )  # fmt: skip
        if ctx.needs_input_grad[2]:
            to_temperature = (temperature_grad * of_rows).sum().to(temperature)
    return (
        first_order_only(to_student, inputs),
        first_order_only(to_teacher, inputs),
        first_order_only(to_temperature, inputs),
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
            _of_rows(ctx, grad, student.shape[0]), student, teacher, temperature, *ids, ctx.positive_offset,
            ctx.symmetric, ctx.normalize, row_lse, col_lse, of_teacher,
        )  # fmt: skip

    to_student = to_teacher = to_temperature = None
    with torch.no_grad():
        # Either side's pass yields the temperature's gradient, so one pass serves it.
        if ctx.needs_input_grad[0] or (ctx.needs_input_grad[2] and not ctx.needs_input_grad[1]):
            to_student, to_temperature = gradients(of_teacher=False)
        if ctx.needs_input_grad[1]:
            to_teacher, to_temperature = gradients(of_teacher=True)
    return (
        first_order_only(to_student if ctx.needs_input_grad[0] else None, inputs),
        first_order_only(to_teacher, inputs),
        first_order_only(to_temperature if ctx.needs_input_grad[2] else None, inputs),
        None, None, None, None, None, None,
    )  # fmt: skip


register_autograd("info_nce_one_pass", _setup_rows, _backward_rows)
register_autograd("info_nce", _setup_both, _backward_both)


FOREACH_BACKENDS = ("triton",)
FOREACH_SCHEMAS = [
    "info_nce_foreach(Tensor[] students, Tensor[] teachers, Tensor temperature, Tensor? student_ids, "
    "Tensor? teacher_ids, int positive_offset, bool normalize) "
    "-> (Tensor losses, Tensor student_grads, Tensor temperature_grads, Tensor columns)",
]
define(FOREACH_SCHEMAS, "info_nce_foreach", FOREACH_BACKENDS)


def info_nce_foreach(
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
    if _runs_as_one(students, teachers, direction):
        if temperature.requires_grad:
            temperature = temperature.to(students[0].device)
        return call(
            op("info_nce_foreach", "triton"),
            students, teachers, temperature, student_ids, teacher_ids, positive_offset, normalize,
        )[0]  # fmt: skip
    ids = student_ids, teacher_ids
    return torch.stack([
        info_nce(student, teacher, temperature, *ids, positive_offset, direction, normalize, mean=True)
        for student, teacher in zip(students, teachers, strict=True)
    ])  # fmt: skip


def _runs_as_one(students: list[Tensor], teachers: list[Tensor], direction: str) -> bool:
    first = students[0]
    pairs_of_rows = sum(s.shape[0] * t.shape[0] for s, t in zip(students, teachers, strict=True))
    backend = select("info_nce", first.device, first.dtype, pairs_of_rows)
    if backend not in FOREACH_BACKENDS or first.dtype == torch.float64:
        return False
    if direction != "student_to_teacher" or not torch.is_grad_enabled():
        return False
    alike = all(s.dtype == first.dtype and s.shape[0] == first.shape[0] for s in students)
    alike = alike and all(t.shape[0] == teachers[0].shape[0] for t in teachers)
    return alike and any(s.requires_grad for s in students) and not any(t.requires_grad for t in teachers)


@register_fake("info_nce_foreach", FOREACH_BACKENDS)
def _(students, teachers, temperature, student_ids, teacher_ids, positive_offset, normalize):
    first, width = students[0], sum(student.shape[1] for student in students)
    numbers = first.new_empty(len(students), first.shape[0], dtype=torch.float32)
    columns = first.new_empty(width, dtype=torch.int64)
    return numbers.new_empty(len(students)), numbers.new_empty(first.shape[0], width), numbers, columns


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


register_autograd("info_nce_foreach", _setup_foreach, _backward_foreach, FOREACH_BACKENDS)
