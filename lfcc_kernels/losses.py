"""`LFCCLoss`: filters and projections of the student, and the contrast of all stages and scales."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lfcc_kernels._checks import check_fit, check_map, check_scales
from lfcc_kernels.contrast import Gather, InfoNCELoss
from lfcc_kernels.distributed import GatheredKeys, PendingKeys, resolve_group
from lfcc_kernels.filters import LowPassPyramid
from lfcc_kernels.functional import lowpass_of_maps


class _TokenLayout(NamedTuple):
    """The options of `lowpass` for tokens (B, N, C)."""

    grid: tuple[int, int] | None = None
    prefix_tokens: int = 0


class LFCCLoss(nn.Module):
    """Low-frequency contrastive distillation between two networks of any architecture.

    In every stage, both feature maps are low-passed to s x s grids for every scale s, the student's cells are
    projected to the teacher's channels, and the flattened grids of student and teacher are contrasted within the
    batch by `info_nce`. The loss is the mean over stages and scales. It is a reconstruction of arXiv 2405.18524; the
    documentation lists what the paper leaves open and the choices made here.

    Args:
        student_channels: Channels of the student's features, one int per stage.
        teacher_channels: Channels of the teacher's features, one int per stage.
        scales: Sizes of the output grids of the low-pass.
        temperature: As for `InfoNCELoss`, shared by stages and scales.
        direction: As for `InfoNCELoss`.
        student_filter: Filter bank of the student, as for `LowPassPyramid`.
        teacher_filter: Filter bank of the teacher, without trainable parameters: "average", "gaussian" or "dct".
        learnable_temperature: As for `InfoNCELoss`.
        gather: As for `InfoNCELoss`.
        return_parts: Also return the loss of each stage and scale, {(stage, scale): loss}.
        student_grid: (H, W) of the student's tokens (B, N, C), as for `lowpass`.
        teacher_grid: (H, W) of the teacher's tokens.
        student_prefix_tokens: Number of class and register tokens of the student, as for `lowpass`.
        teacher_prefix_tokens: Number of class and register tokens of the teacher.

    Raises:
        TypeError: `scales` is not a sequence of ints.
        ValueError: An argument has an unsupported value, or the sides differ in their number of stages.
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
                f"LFCCLoss: student_channels has {len(student_channels)} stages but teacher_channels has "
                f"{len(teacher_channels)}; expected the same number, at least one"
            )
        if teacher_filter == "learnable":
            raise ValueError(
                "LFCCLoss: teacher_filter is 'learnable', but the teacher is frozen, so the filter would remain the "
                "average; use teacher_filter='average'"
            )
        self.scales = check_scales("LFCCLoss", scales)
        self.return_parts = return_parts
        self._student_tokens = _TokenLayout(student_grid, student_prefix_tokens)
        self._teacher_tokens = _TokenLayout(teacher_grid, teacher_prefix_tokens)
        self.student_filters = nn.ModuleList(LowPassPyramid(self.scales, student_filter) for _ in student_channels)
        self.student_projections = nn.ModuleList(
            nn.Linear(c_student, c_teacher, bias=False)
            for c_student, c_teacher in zip(student_channels, teacher_channels, strict=True)
        )
        self.teacher_filter = _frozen(LowPassPyramid(self.scales, teacher_filter))
        self.info_nce = InfoNCELoss(temperature, direction, learnable_temperature, gather)

    def forward(
        self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], ids: Tensor | None = None
    ) -> Tensor | tuple[Tensor, dict[tuple[int, int], Tensor]]:
        """The loss of a batch.

        Args:
            student_features: Maps (B, C, H, W) or tokens (B, N, C), one per stage.
            teacher_features: The same for the teacher; it gets no gradient.
            ids: Integers (B,). Images with equal ids are not negatives of each other.

        Returns:
            Scalar of float32 (float64 for float64 parameters). With `return_parts` a pair of it and a dict of the
            scalar losses by (stage, scale).

        Raises:
            TypeError: A feature is not a tensor or has an unsupported dtype.
            ValueError: A feature has the wrong shape, device or number of channels, or the sides differ in their
                number of images or stages.
        """
        teachers = self.teacher_pyramids(teacher_features)
        pending = self.gather_async(teachers, ids)
        students = self.student_pyramids(student_features)
        return self.contrast(students, teachers, ids, keys=None if pending is None else pending.wait())

    def student_pyramids(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Low-pass and project the student's features.

        Args:
            features: Maps (B, C, H, W) or tokens (B, N, C), one per stage.

        Returns:
            One tensor (B, cells, C_t) per stage, in the dtype of the parameters.
        """
        filters: list[LowPassPyramid] = list(self.student_filters)  # type: ignore[arg-type]  # ModuleList is not generic
        pooled = self._low_pass("student", features, self._student_tokens, filters)
        # Pooling commutes with a linear map of the channels, so the few cells are projected and not the map.
        with torch.autocast(pooled[0].device.type, enabled=False):
            return [
                projection(cells.to(projection.weight.dtype))  # type: ignore[arg-type]  # ModuleList is not generic
                for cells, projection in zip(pooled, self.student_projections, strict=True)
            ]

    @torch.no_grad()
    def teacher_pyramids(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Low-pass the teacher's features, without gradient. The result can be stored in place of the teacher.

        Args:
            features: Maps (B, C, H, W) or tokens (B, N, C), one per stage.

        Returns:
            One tensor (B, cells, C_t) per stage, in the dtype of the feature.
        """
        filters = [self.teacher_filter] * len(self.student_projections)
        return self._low_pass("teacher", features, self._teacher_tokens, filters)

    def gather_async(self, teacher_pyramids: Sequence[Tensor], ids: Tensor | None = None) -> PendingKeys | None:
        """Start to send the teacher's pyramids to all ranks, e.g. before the student's forward pass.

        Args:
            teacher_pyramids: Tensors (B, cells, C_t), one per stage.
            ids: Integers (B,) of the images.

        Returns:
            An object whose `wait()` returns the `keys` for `contrast`; None if `contrast` needs this rank's pyramids
            only.

        Raises:
            ValueError: On every rank, if the ranks differ in batch size, dtype or use of ids.
        """
        group = resolve_group(self.info_nce.gather)
        if group is None or self.info_nce.direction == "teacher_to_student":
            return None
        return PendingKeys([pyramid.detach() for pyramid in teacher_pyramids], ids, group)

    def contrast(
        self,
        student_pyramids: Sequence[Tensor],
        teacher_pyramids: Sequence[Tensor],
        ids: Tensor | None = None,
        *,
        keys: GatheredKeys | None = None,
        temperature: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[tuple[int, int], Tensor]]:
        """The loss of pyramids.

        Args:
            student_pyramids: Tensors (B, cells, C_t), one per stage, from `student_pyramids`.
            teacher_pyramids: Tensors (B, cells, C_t), one per stage, from `teacher_pyramids`.
            ids: Integers (B,) of the images.
            keys: Pyramids and ids of all ranks, if `gather_async` sent them; otherwise they are gathered here.
            temperature: 0-d tensor that replaces the module's temperature.

        Returns:
            As `forward`.

        Raises:
            ValueError: The sides differ in their number of stages or images.
        """
        if len(student_pyramids) != len(teacher_pyramids):
            raise ValueError(
                f"LFCCLoss: student_pyramids has {len(student_pyramids)} entries but teacher_pyramids has "
                f"{len(teacher_pyramids)}; expected one per stage on both sides"
            )
        for stage, (student, teacher) in enumerate(zip(student_pyramids, teacher_pyramids, strict=True)):
            if len(student) != len(teacher):
                raise ValueError(
                    f"LFCCLoss: stage {stage} has {len(teacher)} teacher rows but {len(student)} student rows; both "
                    "sides need features of the same images"
                )
        queries, dtype = self._rows(student_pyramids), student_pyramids[0].dtype
        teachers = self._rows([pyramid.detach().to(dtype) for pyramid in teacher_pyramids])
        if keys is not None:
            keys = GatheredKeys(self._rows(keys.tensors), keys.ids)
        losses = self.info_nce.forward_many(queries, teachers, ids, temperature=temperature, keys=keys)
        if not self.return_parts:
            return losses.mean()
        places = [(stage, scale) for stage in range(len(student_pyramids)) for scale in self.scales]
        return losses.mean(), dict(zip(places, losses.unbind(), strict=True))

    def _rows(self, pyramids: Sequence[Tensor]) -> list[Tensor]:
        """The rows (B, s * s * C_t) of every stage and scale."""
        cells = [s * s for s in self.scales]
        return [grid.flatten(1) for pyramid in pyramids for grid in pyramid.split(cells, 1)]

    def _low_pass(
        self, side: str, features: Sequence[Tensor], tokens: _TokenLayout, pyramids: Sequence[LowPassPyramid]
    ) -> list[Tensor]:
        """Pyramids (B, cells, C) of all stages in one call."""
        if isinstance(features, Tensor) or len(features) != len(pyramids):
            got = "one tensor" if isinstance(features, Tensor) else f"{len(features)} tensors"
            raise ValueError(
                f"LFCCLoss: {side}_features is {got}; expected a list of {len(pyramids)} tensors, one per stage"
            )
        feature_maps = []
        for stage, (x, projection) in enumerate(zip(features, self.student_projections, strict=True)):
            name = f"LFCCLoss: {side}_features[{stage}]"
            layout = tokens if isinstance(x, Tensor) and x.dim() == 3 else _TokenLayout()
            feature_maps.append(check_map(name, x, *layout, options=f"{side}_"))
            channels = x.shape[1] if x.dim() == 4 else x.shape[2]
            expected = projection.in_features if side == "student" else projection.out_features
            if channels != expected:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}, i.e. {channels} channels, but {side}_channels[{stage}] is "
                    f"{expected}; expected a map (B, C, H, W) or tokens (B, N, C)"
                )
            check_fit(feature_maps[-1], self.scales)
        pairs = [pyramid.filters_of(x) for pyramid, x in zip(pyramids, feature_maps, strict=True)]
        filters = [pair for pair in pairs if pair is not None]
        return lowpass_of_maps(feature_maps, self.scales, filters or None)


def _frozen(module: LowPassPyramid) -> LowPassPyramid:
    """Turns the parameters into buffers, which move and save with the module but which no optimizer updates."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            delattr(child, name)
            child.register_buffer(name, parameter.detach())
    return module
