"""The whole loss: a ResNet-18 under a Swin-T, every pair of OFA-KD, and memory against the batch on small maps.

With average filters "eager" aligns the student's map with a 1 x 1 convolution and then pools, as distillation code is
mostly written; "eager, pooled first" has our order, which gives the same loss for a fraction of the products. With
filters that learn, "eager" has our order.

Counted in two steps, pooling in bytes (S and T of student and teacher features, Y of the pyramids) and then
projection and contrast in FLOPs, both in the dtype of the features.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

import lfcc_kernels as lk
from lfcc_kernels.bench import machine, peers
from lfcc_kernels.bench.cases.base import CELLS, SCALES, TEMPERATURE, Case, Step, compiled
from lfcc_kernels.bench.cases.ofa import MODELS, PAIRS, Model

QUICK = ("deit_t", "convnext_t")


def cases(tiny: bool, dtype: torch.dtype | None) -> list[Case]:
    one, two = dtype or torch.float32, dtype or torch.bfloat16
    if machine.HERE.device.type == "cuda":
        batch, own = 256, two
        under_swin = [
            _resnet_under_swin("average", "fwd+bwd", tiny, 256, two, compile=True),
            _resnet_under_swin("average", "fwd", tiny, 256, two),
            _resnet_under_swin("learnable", "fwd+bwd", tiny, 256, two),
            *(_resnet_under_swin("average", "fwd+bwd", tiny, 128, dtype) for dtype in (two, one)),
            _resnet_under_swin("average", "fwd+bwd", tiny, 256, one),
        ]
    else:
        batch, own = 64, one
        under_swin = [
            _resnet_under_swin("average", "fwd", tiny, 128, one),
            _resnet_under_swin("average", "fwd+bwd", tiny, 128, one, compile=True, memory=True),
            _resnet_under_swin("learnable", "fwd+bwd", tiny, 128, one),
        ]
    return [
        *under_swin,
        *(_pair(*pair, tiny, batch, own) for pair in PAIRS),
        *(small_maps(batch, tiny, one) for batch in (1024, 2048)),
    ]


def small_maps(batch: int, tiny: bool, dtype: torch.dtype) -> Case:
    """Maps so small that a B x B matrix would show in the memory."""
    model = Model("", (32,), (4,))
    return _case("small-maps", batch // 32 if tiny else batch, "fwd+bwd", model, model, dtype, memory=True, heaps=False)


def _resnet_under_swin(
    student_filter: str,
    mode: str,
    tiny: bool,
    batch: int,
    dtype: torch.dtype,
    **options,
) -> Case:
    student, teacher = MODELS["resnet18"], replace(MODELS["swin_t"], layout="nchw")
    if tiny:
        batch, student, teacher = batch // 32, student.narrow(16), teacher.narrow(16)
    return _case(student_filter, batch, mode, student, teacher, dtype, student_filter, **options)


def _pair(student: str, teacher: str, tiny: bool, batch: int, dtype: torch.dtype) -> Case:
    models = [MODELS[name].narrow(8) if tiny else MODELS[name] for name in (student, teacher)]
    label, quick = f"{student}-from-{teacher}", (student, teacher) == QUICK
    batch = batch // 32 if tiny else batch
    return _case(label, batch, "fwd+bwd", *models, dtype, "learnable", quick=quick, heaps=False)


def _case(
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
        ).to(machine.HERE.device)

    def ours(*features: Tensor) -> Tensor:
        return module()(features[:stages], features[stages:])

    def written(loss: Callable[..., Tensor], *features: Tensor) -> Tensor:
        weights = [projection.weight for projection in module().student_projections]
        pyramids = zip(module().student_filters, student.grids, strict=True)
        filters = [[pyramid.bank(grid, grid) for pyramid, grid in pyramids]] if learnable else []
        maps = _maps(student, features[:stages]), _maps(teacher, features[stages:])
        return loss(*maps, weights, *filters, SCALES, TEMPERATURE)

    def inputs() -> tuple[Tensor, ...]:
        return *student.features(batch, mode != "fwd", dtype), *teacher.features(batch, False, dtype)

    if not learnable:
        eager = {"eager": peers.lfcc_project_maps, "eager, pooled first": peers.lfcc_pool_each_scale}
    else:
        eager = {"eager": peers.lfcc_filter_each_scale}
    eager |= compiled(eager) if compile else {}
    steps, formula = _cost(batch, mode, student, teacher, learnable, dtype.itemsize)
    return Case(
        "lfcc",
        label,
        (batch, stages, len(SCALES)),
        mode,
        inputs,
        {"ours": ours} | {name: partial(written, loss) for name, loss in eager.items()},
        steps,
        formula,
        dtype=dtype,
        parameters=lambda: tuple(module().parameters()),
        **options,
    )


def _maps(model: Model, features: Sequence[Tensor]) -> list[Tensor]:
    """All as maps, tokens seen as such."""
    if features[0].dim() == 4:
        return list(features)
    return [
        peers.as_map(tokens, (grid, grid), model.prefix_tokens)
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
