"""The losses as modules: they own what learns, and call the functions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lfcc_kernels.distributed import RowsOfAllRanks, contrast_across_ranks, resolve_group
from lfcc_kernels.filters import BANKS
from lfcc_kernels.functional import (
    DIRECTIONS,
    check_scales,
    info_nce,
    info_nce_foreach,
    lowpass,
    lowpass_foreach,
    map_size,
)

Gather = str | dist.ProcessGroup


class LowPassPyramid(nn.Module):
    """Low-pass a feature map at several scales with one of the filter banks.

    Args:
        scales: output grids, s x s each.
        filter: "average" (adaptive windows), "learnable" (trainable weights inside those windows, starting as the
            average), "gaussian" (trainable width) or "dct" (the first s x s coefficients of the DCT-II).
    """

    def __init__(self, scales: Sequence[int] = (1, 2, 4), filter: str = "average") -> None:
        super().__init__()
        if filter not in BANKS:
            raise ValueError(f"LowPassPyramid: filter is {filter!r}; expected one of {', '.join(BANKS)}")
        self.scales = check_scales(scales)
        self.bank = BANKS[filter](self.scales)

    def forward(self, x: Tensor, *, grid: tuple[int, int] | None = None, prefix_tokens: int = 0) -> Tensor:
        """Map (B, C, H, W) or tokens (B, N, C) -> (B, cells, C) in x's dtype; arguments as `lowpass`."""
        row_filters, col_filters = self.filters(x, grid, prefix_tokens) or (None, None)
        return lowpass(
            x,
            self.scales,
            row_filters=row_filters,
            col_filters=col_filters,
            grid=grid,
            prefix_tokens=prefix_tokens,
        )

    def filters(
        self, x: Tensor, grid: tuple[int, int] | None = None, prefix_tokens: int = 0
    ) -> tuple[Tensor, Tensor] | None:
        """The bank's matrices for this map, as `lowpass` takes them; None for the average."""
        row_filters, col_filters = self.bank(*map_size(x, grid, prefix_tokens))
        if row_filters is None:
            return None
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return row_filters.to(dtype), col_filters.to(dtype)


class InfoNCELoss(nn.Module):
    """`info_nce` with a temperature that may learn and negatives that may come from all ranks.

    Args:
        temperature: positive number; where it learns, the start.
        direction: "student_to_teacher", "teacher_to_student" or "symmetric".
        learnable_temperature: train log(temperature), so that it stays positive.
        gather: "auto" takes the negatives of all ranks where a process group is initialised, "none" those of this
            rank; a `ProcessGroup` names the ranks. Every rank must hold the same number of rows (drop_last=True).
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
            raise ValueError(f"InfoNCELoss: temperature is {temperature}; expected a positive finite number, as 0.1")
        if direction not in DIRECTIONS:
            raise ValueError(f"InfoNCELoss: direction is {direction!r}; expected one of {', '.join(DIRECTIONS)}")
        if isinstance(gather, str) and gather not in ("auto", "none"):
            raise ValueError(f"InfoNCELoss: gather is {gather!r}; expected 'auto', 'none' or a ProcessGroup")
        self.direction, self.gather = direction, gather
        if learnable_temperature:
            self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)]))  # FSDP takes no 0-d parameter
        else:
            self._temperature = temperature

    @property
    def temperature(self) -> float | Tensor:
        """The temperature as `info_nce` takes it: a float, or a 0-d tensor where it learns."""
        return self.log_temperature.float().exp().squeeze(0) if hasattr(self, "log_temperature") else self._temperature

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        student_ids: Tensor | None = None,
        teacher_ids: Tensor | None = None,
    ) -> Tensor:
        """Rows (B, D) of student and teacher, row i of one the positive of row i of the other -> scalar loss."""
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

    def of_pairs(
        self,
        students: Sequence[Tensor],
        teachers: Sequence[Tensor],
        ids: Tensor | None = None,
        *,
        temperature: Tensor | None = None,
        keys: tuple[Sequence[Tensor], Tensor | None] | None = None,
    ) -> Tensor:
        """The loss of every pair of a list, (pairs,); `ids` are those of the images, the same on both sides.

        `temperature` in place of the module's own; `keys`, the teachers' rows and ids of all ranks where they were
        gathered before.
        """
        temperature = self.temperature if temperature is None else temperature
        group = resolve_group(self.gather)
        if group is not None:
            return contrast_across_ranks(students, teachers, temperature, self.direction, ids, ids, group, keys)
        return info_nce_foreach(
            students,
            teachers,
            temperature=temperature,
            direction=self.direction,
            student_ids=ids,
            teacher_ids=ids,
        )


class LFCCLoss(nn.Module):
    """Low-frequency contrastive distillation between two networks of any architecture.

    For every stage, both feature maps are low-passed to s x s grids for every scale s, the student's cells are
    projected to the teacher's channels, and the flattened grids of student and teacher are contrasted inside the
    batch; the loss is the mean over stages and scales. A reconstruction of arXiv 2405.18524: see the README for
    what the paper leaves open and what was chosen.

    Args:
        student_channels, teacher_channels: channels of each stage's features, one int a stage.
        scales: output grids of the low-pass.
        temperature, direction, learnable_temperature, gather: as `InfoNCELoss`, shared by stages and scales.
        student_filter: filter bank of the student, as `LowPassPyramid`.
        teacher_filter: filter bank of the teacher, which has no parameters: "average", "gaussian" or "dct".
        return_parts: also return {(stage, scale): loss}.
        student_grid, teacher_grid, student_prefix_tokens, teacher_prefix_tokens: for tokens (B, N, C), as `lowpass`.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        scales: Sequence[int] = (1, 2, 4),
        temperature: float = 0.1,
        direction: str = "student_to_teacher",
        student_filter: str = "learnable",
        teacher_filter: str = "average",
        learnable_temperature: bool = False,
        gather: Gather = "auto",
        return_parts: bool = False,
        student_grid: tuple[int, int] | None = None,
        teacher_grid: tuple[int, int] | None = None,
        student_prefix_tokens: int = 0,
        teacher_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        if not student_channels or len(student_channels) != len(teacher_channels):
            raise ValueError(
                f"LFCCLoss: student_channels has {len(student_channels)} stages, teacher_channels "
                f"{len(teacher_channels)}; expected the same number, at least one"
            )
        if teacher_filter == "learnable":
            raise ValueError(
                "LFCCLoss: the teacher is frozen, so a learnable teacher_filter would stay the average it starts as; "
                "use teacher_filter='average'"
            )
        self.scales = check_scales(scales)
        self.return_parts = return_parts
        self._student_tokens = {"grid": student_grid, "prefix_tokens": student_prefix_tokens}
        self._teacher_tokens = {"grid": teacher_grid, "prefix_tokens": teacher_prefix_tokens}
        self.student_filters = nn.ModuleList(LowPassPyramid(self.scales, student_filter) for _ in student_channels)
        self.student_projections = nn.ModuleList(
            nn.Linear(c_student, c_teacher, bias=False)
            for c_student, c_teacher in zip(student_channels, teacher_channels, strict=True)
        )
        self.teacher_filter = _frozen(LowPassPyramid(self.scales, teacher_filter))
        self.info_nce = InfoNCELoss(temperature, direction, learnable_temperature, gather)

    def forward(
        self,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[tuple[int, int], Tensor]]:
        """Two lists of (B, C, H, W) or (B, N, C), one entry a stage -> scalar loss (and parts).

        `ids` (B,), integers: images with equal ids are no negatives of each other.
        """
        teachers = self.teacher_pyramids(teacher_features)
        travelling = self.start_gather(teachers, ids)
        students = self.student_pyramids(student_features)
        return self.contrast(students, teachers, ids, keys=travelling and travelling.wait())

    def student_pyramids(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Low-passed and projected features, (B, cells, C_t) float32 (float64 for float64) a stage."""
        self._check_stages("student", features)
        pooled = self._low_pass(features, self.student_filters, self._student_tokens)
        # Pooling commutes with a bias-free channel map, so project the few cells, not the map.
        with torch.autocast(pooled[0].device.type, enabled=False):
            return [
                projection(cells.to(projection.weight.dtype))
                for cells, projection in zip(pooled, self.student_projections, strict=True)
            ]

    @torch.no_grad()
    def teacher_pyramids(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Low-passed features, (B, cells, C_t) a stage, without gradient; may be kept in a teacher's place."""
        self._check_stages("teacher", features)
        return self._low_pass(features, [self.teacher_filter] * len(features), self._teacher_tokens)

    def start_gather(self, teacher_pyramids: Sequence[Tensor], ids: Tensor | None = None) -> RowsOfAllRanks | None:
        """Send the teacher's pyramids to all ranks; `contrast` takes what `wait` of the result returns as its keys.

        Called before the student's forward pass, they travel during it. None where `contrast` needs no pyramids but
        this rank's. Raises ValueError, on every rank, where the ranks' batches differ in size.
        """
        group = resolve_group(self.info_nce.gather)
        if group is None or self.info_nce.direction == "teacher_to_student":
            return None
        return RowsOfAllRanks([pyramid.detach() for pyramid in teacher_pyramids], ids, group)

    def contrast(
        self,
        student_pyramids: Sequence[Tensor],
        teacher_pyramids: Sequence[Tensor],
        ids: Tensor | None = None,
        *,
        keys: tuple[Sequence[Tensor], Tensor | None] | None = None,
        temperature: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[tuple[int, int], Tensor]]:
        """The loss of pyramids (B, cells, C_t), one a stage, as the methods above return them.

        `keys`: pyramids and ids of all ranks, where `start_gather` sent these; else they are gathered here.
        `temperature` (0-d) is taken in place of the module's own.
        """
        if len(student_pyramids) != len(teacher_pyramids):
            raise ValueError(
                f"LFCCLoss: {len(student_pyramids)} student and {len(teacher_pyramids)} teacher pyramids; "
                "expected the same number, one a stage"
            )
        for stage, (student, teacher) in enumerate(zip(student_pyramids, teacher_pyramids, strict=True)):
            if len(student) != len(teacher):
                raise ValueError(
                    f"LFCCLoss: stage {stage} has {len(student)} student rows and {len(teacher)} teacher rows; "
                    "both sides must come from the same images"
                )
        queries, dtype = self._rows(student_pyramids), student_pyramids[0].dtype
        teachers = self._rows([pyramid.detach().to(dtype) for pyramid in teacher_pyramids])
        keys = keys and (self._rows(keys[0]), keys[1])
        losses = self.info_nce.of_pairs(queries, teachers, ids, temperature=temperature, keys=keys)
        if not self.return_parts:
            return losses.mean()
        places = [(stage, scale) for stage in range(len(student_pyramids)) for scale in self.scales]
        return losses.mean(), dict(zip(places, losses.unbind(), strict=True))

    def _rows(self, pyramids: Sequence[Tensor]) -> list[Tensor]:
        """The rows (B, s * s * C_t) of every stage and scale."""
        cells = [s * s for s in self.scales]
        return [grid.flatten(1) for pyramid in pyramids for grid in pyramid.split(cells, 1)]

    def _low_pass(
        self, features: Sequence[Tensor], pyramids: Sequence[LowPassPyramid], of_tokens: dict[str, Any]
    ) -> list[Tensor]:
        """Pyramids (B, cells, C) of all stages at once."""
        of_map = {"grid": None, "prefix_tokens": 0}
        layouts = [of_tokens if feature.dim() == 3 else of_map for feature in features]
        filters = [
            pyramid.filters(feature, **layout)
            for pyramid, feature, layout in zip(pyramids, features, layouts, strict=True)
        ]
        return lowpass_foreach(
            features,
            self.scales,
            filters=None if filters[0] is None else filters,
            grids=[layout["grid"] for layout in layouts],
            prefix_tokens=[layout["prefix_tokens"] for layout in layouts],
        )

    def _check_stages(self, side: str, features: Sequence[Tensor]) -> None:
        if isinstance(features, Tensor) or len(features) != len(self.student_projections):
            got = "one tensor" if isinstance(features, Tensor) else f"{len(features)} tensors"
            raise ValueError(
                f"LFCCLoss: {side}_features is {got}; expected a list of {len(self.student_projections)}, one a stage"
            )
        for stage, (feature, projection) in enumerate(zip(features, self.student_projections, strict=True)):
            if not isinstance(feature, Tensor):
                raise TypeError(f"LFCCLoss: {side}_features[{stage}] is a {type(feature).__name__}; expected a tensor")
            expected = projection.in_features if side == "student" else projection.out_features
            channels = feature.shape[1] if feature.dim() == 4 else feature.shape[-1]
            if channels != expected:
                raise ValueError(
                    f"LFCCLoss: {side}_features[{stage}] has shape {tuple(feature.shape)}, so {channels} channels; "
                    f"{side}_channels says {expected}. Maps are (B, C, H, W), tokens (B, N, C)"
                )


def _frozen(module: nn.Module) -> nn.Module:
    """The module with its parameters turned into buffers: they move and save, and no optimizer finds them."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            delattr(child, name)
            child.register_buffer(name, parameter.detach())
    return module
