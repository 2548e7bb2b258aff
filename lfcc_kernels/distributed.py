"""Contrast across ranks: each rank's rows against the rows of every rank, with the single-process gradient."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from lfcc_kernels.functional import info_nce


def resolve_group(gather: "str | dist.ProcessGroup") -> "dist.ProcessGroup | None":
    """The group to gather from, or None where there is one rank or `gather` is "none"."""
    if gather == "none" or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if gather == "auto" else gather
    return group if dist.get_world_size(group) > 1 else None


def contrast_across_ranks(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor,
    direction: str,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    group: "dist.ProcessGroup",
) -> Tensor:
    """Mean loss of this rank's rows against all ranks' rows of the other side.

    The gather's backward sums over ranks, so with gradients averaged over ranks (as DDP does) the result is the
    gradient of one process that holds the whole batch. teacher_to_student contrasts this rank's teacher rows with
    all student rows: the roles are exchanged, since a local column would miss the other ranks' rows.
    """

    def one_way(queries: Tensor, keys: Tensor, query_ids: Tensor | None, key_ids: Tensor | None) -> Tensor:
        return info_nce(
            queries,
            _gather(keys, group),
            temperature=temperature,
            student_ids=query_ids,
            teacher_ids=None if key_ids is None else _gather(key_ids, group),
            positive_offset=dist.get_rank(group) * len(queries),
        )

    losses = []
    if direction != "teacher_to_student":
        losses.append(one_way(student, teacher, student_ids, teacher_ids))
    if direction != "student_to_teacher":
        losses.append(one_way(teacher, student, teacher_ids, student_ids))
    return sum(losses) / len(losses)


def _gather(rows: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Rows of all ranks in rank order; the gradient flows back only where `rows` asks for one."""
    needs_grad = torch.is_grad_enabled() and rows.requires_grad
    gather = collectives.all_gather_tensor_autograd if needs_grad else collectives.all_gather_tensor
    return collectives.wait_tensor(gather(rows.contiguous(), 0, group))
