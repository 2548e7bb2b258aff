"""Suite `lfcc`: the whole loss for a ResNet-18 student of a Swin-T, for every pair of OFA-KD, and on small maps.

With average filters "eager" aligns the student's map with a 1 x 1 convolution and then pools, as most distillation code
does; "eager, pooled first" pools and then projects, as `LFCCLoss` does, which gives the same loss for a fraction of the
products. With learnable filters "eager" pools first.

Counted in two steps: pooling in bytes (S and T of student and teacher features, Y of the pyramids), then projection and
contrast in FLOPs, both in the dtype of the features.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

import lfcc_kernels as lk
from lfcc_kernels.bench.cases.base import CELLS, SCALES, TEMPERATURE, Candidate, Case, Step, compiled, features
from lfcc_kernels.bench.machine import Machine
from lfcc_kernels.bench.ofa import MODELS, PAIRS, Model
from lfcc_kernels.bench.peers import pooling, whole_loss

QUICK = ("deit_t", "convnext_t")


def cases(machine: Machine, dtype: torch.dtype | None) -> list[Case]:
    float32, bfloat16 = dtype or torch.float32, dtype or torch.bfloat16
    swin = partial(_resnet_from_swin, machine)
    if machine.gpu:
        batch, pair_dtype = 256, bfloat16
        from_swin = [
            swin("average", "fwd+bwd", 256, bfloat16, compile=True),
            swin("average", "fwd", 256, bfloat16),
            swin("learnable", "fwd+bwd", 256, bfloat16),
            *(swin("average", "fwd+bwd", 128, dtype) for dtype in (bfloat16, float32)),
            swin("average", "fwd+bwd", 256, float32),
        ]
    else:
        batch, pair_dtype = 64, float32
        from_swin = [
            swin("average", "fwd", 128, float32),
            swin("average", "fwd+bwd", 128, float32, compile=True, memory=True),
            swin("learnable", "fwd+bwd", 128, float32),
        ]
    return [
        *from_swin,
        *(_pair(machine, *pair, batch, pair_dtype) for pair in PAIRS),
        *(small_maps(machine, batch, float32) for batch in (1024, 2048)),
    ]


def small_maps(machine: Machine, batch: int, dtype: torch.dtype) -> Case:
    """Maps so small that a B x B matrix would dominate the memory."""
    model = Model("", (32,), (4,))
    return _case(machine, "small-maps", batch, "fwd+bwd", model, model, dtype, memory=True, heaps=False)


def _resnet_from_swin(
    machine: Machine, student_filter: str, mode: str, batch: int, dtype: torch.dtype, **options
) -> Case:
    models = MODELS["resnet18"], replace(MODELS["swin_t"], layout="nchw")
    student, teacher = (model.narrow(16) if machine.tiny else model for model in models)
    return _case(machine, student_filter, batch, mode, student, teacher, dtype, student_filter, **options)


def _pair(machine: Machine, student: str, teacher: str, batch: int, dtype: torch.dtype) -> Case:
    models = {name: MODELS[name].narrow(8) if machine.tiny else MODELS[name] for name in (student, teacher)}
    label, quick = f"{student}-from-{teacher}", (student, teacher) == QUICK
    pair = models[student], models[teacher]
    return _case(machine, label, batch, "fwd+bwd", *pair, dtype, "learnable", quick=quick, heaps=False)


def _case(
    machine: Machine,
    label: str,
    batch: int,
    mode: str,
    student: Model,
    teacher: Model,
    dtype: torch.dtype,
    student_filter: str = "average",
    compile: bool = False,
    **options,
) -> Case:
    batch = batch // 32 if machine.tiny else batch
    stages, learnable = len(student.channels), student_filter == "learnable"

    @cache
    def module() -> lk.LFCCLoss:
        return lk.LFCCLoss(
            student.channels,
            teacher.channels,
            scales=SCALES,
            temperature=TEMPERATURE,
            student_filter=student_filter,
            student_prefix_tokens=student.prefix_tokens,
            teacher_prefix_tokens=teacher.prefix_tokens,
        ).to(machine.device)

    def lfcc(*features: Tensor) -> Tensor:
        return module()(features[:stages], features[stages:])

    def eager(loss: Callable[..., Tensor], *features: Tensor) -> Tensor:
        weights = list(module().student_projections.parameters())
        pyramids = zip(module().student_filters, student.grids, strict=True)
        filters = [[pyramid.bank(grid, grid) for pyramid, grid in pyramids]] if learnable else []
        maps = as_maps(student, features[:stages]), as_maps(teacher, features[stages:])
        return loss(*maps, weights, *filters, SCALES, TEMPERATURE)

    def inputs() -> tuple[Tensor, ...]:
        students = stage_features(machine, student, batch, mode != "fwd", dtype)
        return *students, *stage_features(machine, teacher, batch, False, dtype)

    losses: dict[str, Candidate]
    if learnable:
        losses = {"eager": whole_loss.filter_each_scale}
    else:
        losses = {"eager": whole_loss.project_maps, "eager, pooled first": whole_loss.pool_each_scale}
    losses |= compiled(machine, losses) if compile else {}
    steps, formula = _cost(batch, mode, student, teacher, learnable, dtype.itemsize)
    return Case(
        "lfcc",
        label,
        (batch, stages, len(SCALES)),
        mode,
        inputs,
        {"lfcc": lfcc} | {name: partial(eager, loss) for name, loss in losses.items()},
        steps,
        formula,
        dtype=dtype,
        parameters=lambda: tuple(module().parameters()),
        **options,
    )


def stage_features(machine: Machine, model: Model, batch: int, learn: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random features of all stages, in the model's layout."""

    def stage(channels: int, grid: int) -> Tensor:
        tokens = model.prefix_tokens + grid**2
        match model.layout:
            case "tokens":
                return features(machine, (batch, tokens, channels), False, dtype)
            case "channels_first_tokens":
                return features(machine, (batch, channels, tokens), False, dtype).transpose(1, 2)
        memory_format = torch.channels_last if model.layout == "channels_last" else torch.contiguous_format
        return features(machine, (batch, channels, grid, grid), False, dtype, memory_format)

    stages = zip(model.channels, model.grids, strict=True)
    return tuple(stage(*channels_and_grid).requires_grad_(learn) for channels_and_grid in stages)


def as_maps(model: Model, features: Sequence[Tensor]) -> list[Tensor]:
    """The features as maps; of tokens a view."""
    if features[0].dim() == 4:
        return list(features)
    return [
        pooling.as_map(tokens, (grid, grid), model.prefix_tokens)
        for tokens, grid in zip(features, model.grids, strict=True)
    ]


def _cost(
    batch: int, mode: str, student: Model, teacher: Model, learnable: bool, itemsize: int
) -> tuple[tuple[Step, ...], str]:
    """Steps and formula; the gradients of filters read the student's features again."""
    learn = mode != "fwd"
    students, teachers = (
        itemsize * batch * sum(channels * grid**2 for channels, grid in zip(model.channels, model.grids, strict=True))
        for model in (student, teacher)
    )
    reads = 1 + learn + (learn and learnable)
    pyramids = itemsize * batch * CELLS * sum(student.channels + teacher.channels)
    contrast, projection = (4, 6) if learn else (2, 2)
    flops = sum(
        contrast * batch**2 * CELLS * t + projection * batch * CELLS * s * t
        for s, t in zip(student.channels, teacher.channels, strict=True)
    )
    maps = ("S", "2 S", "3 S")[reads - 1]
    formula = f"{maps} + T + Y bytes, then {contrast} B^2 s^2 C_t + {projection} B s^2 C_s C_t FLOPs"
    return (Step(reads * students + teachers + pyramids), Step(flops=flops)), formula
