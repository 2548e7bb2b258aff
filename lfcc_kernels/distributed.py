"""Contrast across ranks: each rank's rows against the rows of every rank, with the single-process gradient.

Ranks that bring different numbers of rows raise, all of them, before anything travels (`ops/gather_rows.py`).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lfcc_kernels.functional import info_nce_foreach
from lfcc_kernels.ops.gather_rows import arrived, gather_rows


def resolve_group(gather: "str | dist.ProcessGroup") -> "dist.ProcessGroup | None":
    """The group to gather from, or None where there is one rank or `gather` is "none"."""
    if gather == "none" or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if gather == "auto" else gather
    return group if dist.get_world_size(group) > 1 else None


class RowsOfAllRanks:
    """Tensors (B, ...) of this rank and, after `wait`, those of all ranks in rank order, (ranks * B, ...).

    They start to travel at once, in one message; what has no gradient travels while other work is done. The gradient
    is summed over ranks, so with gradients averaged over ranks (as DDP does) a mean over local rows has the gradient
    of one process that holds the whole batch. `ids` (B,) travel too.

    Raises ValueError, on every rank, where ranks bring different numbers of rows, widths, types, or ids only in part.
    """

    def __init__(self, own: Sequence[Tensor], ids: Tensor | None, group: "dist.ProcessGroup") -> None:
        self.own = list(own)
        parts = [part.flatten(1) for part in own]
        self._widths = [part.shape[1] for part in parts]
        self._rows = gather_rows(torch.cat(parts, 1), ids is not None, group)
        self._ids = None if ids is None else gather_rows(ids.to(torch.int64).unsqueeze(1), True, group)

    def wait(self) -> tuple[list[Tensor], Tensor | None]:
        """The rows and ids of all ranks; the rows are views of one tensor."""
        parts = arrived(self._rows).split(self._widths, 1)
        everybody = [part.unflatten(1, own.shape[1:]) for part, own in zip(parts, self.own, strict=True)]
        return everybody, None if self._ids is None else arrived(self._ids).squeeze(1)


def contrast_across_ranks(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    temperature: float | Tensor,
    direction: str,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    group: "dist.ProcessGroup",
    keys: tuple[Sequence[Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Mean loss (pairs,) of this rank's rows (B, D) against all ranks' rows of the other side, for a list of pairs.

    `keys`: the teachers' rows and ids of all ranks, where they were gathered before. teacher_to_student contrasts this
    rank's teacher rows with all student rows: the roles are exchanged, since a local column would miss the other
    ranks' rows.
    """

    def one_way(queries: Sequence[Tensor], query_ids: Tensor | None, keys: Sequence[Tensor], key_ids: Tensor | None):
        return info_nce_foreach(
            queries,
            [key.to(query.dtype) for key, query in zip(keys, queries, strict=True)],
            temperature=temperature,
            student_ids=query_ids,
            teacher_ids=key_ids,
            positive_offset=dist.get_rank(group) * len(queries[0]),
        )

    losses = []
    if direction != "teacher_to_student":
        keys = RowsOfAllRanks(teachers, teacher_ids, group).wait() if keys is None else keys
        losses.append(one_way(students, student_ids, *keys))
    if direction != "student_to_teacher":
        losses.append(one_way(teachers, teacher_ids, *RowsOfAllRanks(students, student_ids, group).wait()))
    return sum(losses) / len(losses)
