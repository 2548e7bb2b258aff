"""`InfoNCELoss`: the contrastive loss as a module, over the rows of all ranks."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lfcc_kernels.distributed import GatheredKeys, contrast_across_ranks, resolve_group
from lfcc_kernels.functional import DIRECTIONS, info_nce, info_nce_foreach

Gather = str | dist.ProcessGroup


class InfoNCELoss(nn.Module):
    """`info_nce` with an optionally trainable temperature and negatives from all ranks.

    Args:
        temperature: Positive number; the initial value if it is trainable.
        direction: "student_to_teacher", "teacher_to_student" or "symmetric".
        learnable_temperature: Train log(temperature), which keeps the temperature positive.
        gather: "auto" contrasts with the rows of all ranks if a process group is initialised, "none" with those of
            this rank; a `ProcessGroup` selects the ranks. Every rank needs the same number of rows (drop_last=True).

    Raises:
        ValueError: An argument has an unsupported value.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        direction: str = "student_to_teacher",
        learnable_temperature: bool = False,
        gather: Gather = "auto",
    ) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"InfoNCELoss: temperature is {temperature}; expected a positive finite number, e.g. 0.1")
        if direction not in DIRECTIONS:
            raise ValueError(f"InfoNCELoss: direction is {direction!r}; expected one of {', '.join(DIRECTIONS)}")
        if isinstance(gather, str) and gather not in ("auto", "none"):
            raise ValueError(f"InfoNCELoss: gather is {gather!r}; expected 'auto', 'none' or a ProcessGroup")
        self.direction, self.gather = direction, gather
        if learnable_temperature:
            # One element, because FSDP does not support 0-d parameters.
            self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)]))
        else:
            self._temperature = temperature

    @property
    def temperature(self) -> float | Tensor:
        """The temperature as `info_nce` expects it: a float, or a 0-d tensor if it is trainable."""
        return self.log_temperature.float().exp().squeeze(0) if hasattr(self, "log_temperature") else self._temperature

    def forward(
        self, student: Tensor, teacher: Tensor, *, student_ids: Tensor | None = None, teacher_ids: Tensor | None = None
    ) -> Tensor:
        """The mean loss of this rank's rows.

        Args:
            student: (B, D).
            teacher: (B, D); row i is the positive of student row i.
            student_ids: Integers (B,), as for `info_nce`.
            teacher_ids: Integers (B,), as for `info_nce`.

        Returns:
            Scalar of float32 (float64 for float64 inputs).

        Raises:
            TypeError: As `info_nce`.
            ValueError: As `info_nce`; also, on every rank, if the gathered rows differ between ranks.
        """
        group = resolve_group(self.gather)
        if group is not None:
            options = self.temperature, self.direction, student_ids, teacher_ids, group
            return contrast_across_ranks([student], [teacher], *options).squeeze(0)
        return info_nce(
            student,
            teacher,
            temperature=self.temperature,
            direction=self.direction,
            student_ids=student_ids,
            teacher_ids=teacher_ids,
        )

    def forward_many(
        self,
        students: Sequence[Tensor],
        teachers: Sequence[Tensor],
        ids: Tensor | None = None,
        *,
        temperature: Tensor | None = None,
        keys: GatheredKeys | None = None,
    ) -> Tensor:
        """The mean loss of every pair of two lists.

        Args:
            students: Tensors (B, D) of the same B images.
            teachers: Tensors (B, D), one per student tensor.
            ids: Integers (B,) of the images, the same for both sides.
            temperature: 0-d tensor that replaces the module's temperature.
            keys: The teachers' rows and ids of all ranks, if they are gathered already.

        Returns:
            Tensor (pairs,) of float32 (float64 for float64 inputs).
        """
        temperature_or_own = self.temperature if temperature is None else temperature
        group = resolve_group(self.gather)
        if group is not None:
            return contrast_across_ranks(students, teachers, temperature_or_own, self.direction, ids, ids, group, keys)
        return info_nce_foreach(
            students,
            teachers,
            temperature=temperature_or_own,
            direction=self.direction,
            student_ids=ids,
            teacher_ids=ids,
        )
