"""Contrast across ranks: each rank's rows against the rows of all ranks, with the gradient of a single process.

Used by the loss modules. If ranks differ in their number of rows, all of them raise before anything is sent
(`lfcc_kernels.ops.gather_rows`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lfcc_kernels.functional import info_nce_foreach
from lfcc_kernels.ops.gather_rows import gather_rows, wait_rows


class GatheredKeys(NamedTuple):
    """Teacher tensors of all ranks in rank order, against which a rank contrasts its student rows."""

    tensors: list[Tensor]  # (ranks * B, ...) each
    ids: Tensor | None  # (ranks * B,) int64


class PendingKeys:
    """A running gather of tensors (B, ...) and their ids (B,) from all ranks of a group; `wait` completes it.

    The tensors are sent in one message. Those without gradient are sent while other work runs. The gradient is summed
    over ranks: if gradients are then averaged over ranks, as in DDP, a mean over local rows has the gradient of a
    single process with the whole batch.

    Raises:
        ValueError: On every rank, if the ranks differ in number of rows, width, dtype or use of ids.
    """

    def __init__(self, tensors: Sequence[Tensor], ids: Tensor | None, group: dist.ProcessGroup) -> None:
        parts = [tensor.flatten(1) for tensor in tensors]
        self._shapes = [tensor.shape[1:] for tensor in tensors]
        self._widths = [part.shape[1] for part in parts]
        self._rows = gather_rows(torch.cat(parts, 1), ids is not None, group)
        self._ids = None if ids is None else gather_rows(ids.to(torch.int64).unsqueeze(1), True, group)

    def wait(self) -> GatheredKeys:
        """The gathered tensors, which are views of one tensor, and ids."""
        parts = wait_rows(self._rows).split(self._widths, 1)
        tensors = [part.unflatten(1, shape) for part, shape in zip(parts, self._shapes, strict=True)]
        return GatheredKeys(tensors, None if self._ids is None else wait_rows(self._ids).squeeze(1))


def resolve_group(gather: str | dist.ProcessGroup) -> dist.ProcessGroup | None:
    """The group to gather from, or None if there is one rank or `gather` is "none"."""
    if gather == "none" or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if isinstance(gather, str) else gather
    return group if dist.get_world_size(group) > 1 else None


def contrast_across_ranks(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    temperature: float | Tensor,
    direction: str,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    group: dist.ProcessGroup,
    keys: GatheredKeys | None = None,
) -> Tensor:
    """Mean loss (pairs,) of this rank's rows against the rows of all ranks, for every pair of two lists.

    teacher_to_student contrasts this rank's teacher rows with the student rows of all ranks: the roles are exchanged,
    because a local column lacks the rows of other ranks.

    Args:
        students: Tensors (B, D).
        teachers: Tensors (B, D), one per student tensor.
        temperature: As for `info_nce`.
        direction: As for `info_nce`.
        student_ids: Integers (B,), as for `info_nce`.
        teacher_ids: Integers (B,), as for `info_nce`.
        group: The ranks.
        keys: The teachers' rows (ranks * B, D) and ids, if they are gathered already.
    """

    def one_way(queries: Sequence[Tensor], query_ids: Tensor | None, gathered: GatheredKeys) -> Tensor:
        return info_nce_foreach(
            queries,
            [key.to(query.dtype) for key, query in zip(gathered.tensors, queries, strict=True)],
            temperature=temperature,
            student_ids=query_ids,
            teacher_ids=gathered.ids,
            positive_offset=dist.get_rank(group) * len(queries[0]),
        )

    losses = []
    if direction != "teacher_to_student":
        keys = PendingKeys(teachers, teacher_ids, group).wait() if keys is None else keys
        losses.append(one_way(students, student_ids, keys))
    if direction != "student_to_teacher":
        losses.append(one_way(teachers, teacher_ids, PendingKeys(students, student_ids, group).wait()))
    return sum(losses[1:], losses[0]) / len(losses)
