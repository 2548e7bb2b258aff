"""The LFCC loss over all stages and scales, written with torch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lfcc_kernels.bench.peers.contrast import dense, upcast

Maps = Sequence[Tensor]


def pool_each_scale(
    student_maps: Maps, teacher_maps: Maps, projections: Maps, scales: Sequence[int], temperature: float
) -> Tensor:
    """The whole loss: pool once per scale, project the few cells with a 1 x 1 convolution, contrast densely."""
    students = [
        [_project(F.adaptive_avg_pool2d(student, scale), weight) for scale in scales]
        for student, weight in zip(student_maps, projections, strict=True)
    ]
    return _contrast_each_scale(students, teacher_maps, scales, temperature)


def project_maps(
    student_maps: Maps, teacher_maps: Maps, projections: Maps, scales: Sequence[int], temperature: float
) -> Tensor:
    """The whole loss as most distillation code writes it: align the map with a 1 x 1 convolution, then pool."""
    aligned = [_project(student, weight) for student, weight in zip(student_maps, projections, strict=True)]
    students = [[F.adaptive_avg_pool2d(student, scale) for scale in scales] for student in aligned]
    return _contrast_each_scale(students, teacher_maps, scales, temperature)


def filter_each_scale(
    student_maps: Maps,
    teacher_maps: Maps,
    projections: Maps,
    filters: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[int],
    temperature: float,
) -> Tensor:
    """The whole loss with trainable student filters, (row_filters, col_filters) per stage."""
    students = [
        [
            _project(row.to(student.dtype) @ student @ col.t().to(student.dtype), weight)
            for row, col in zip(rows.split(scales), cols.split(scales), strict=True)
        ]
        for student, weight, (rows, cols) in zip(student_maps, projections, filters, strict=True)
    ]
    return _contrast_each_scale(students, teacher_maps, scales, temperature)


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """A 1 x 1 convolution of a map (B, C_s, H, W) with a weight (C_t, C_s)."""
    return F.conv2d(x, weight[:, :, None, None].to(x.dtype))


def _contrast_each_scale(
    students: Sequence[Sequence[Tensor]], teacher_maps: Sequence[Tensor], scales: Sequence[int], temperature: float
) -> Tensor:
    """The mean loss of the students' grids, one per stage and scale, against the pooled maps of the teacher."""
    losses = [
        dense(upcast(grid.flatten(1)), upcast(F.adaptive_avg_pool2d(teacher, scale).flatten(1)), temperature)
        for grids, teacher in zip(students, teacher_maps, strict=True)
        for grid, scale in zip(grids, scales, strict=True)
    ]
    return torch.stack(losses).mean()
