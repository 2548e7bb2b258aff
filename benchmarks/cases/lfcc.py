"""The whole loss: a ResNet-18 under a Swin-T, four stages at three scales; and its memory against the batch.

"eager" aligns the student's map with a 1 x 1 convolution and then pools, as distillation code is mostly written;
"eager, pooled first" has our order, which gives the same loss for a fraction of the products. With filters that
learn, "eager" has our order too.

Counted in two steps, pooling in bytes (S and T of student and teacher maps, Y of the pyramids) and then
projection and contrast in FLOPs, both in the dtype of the maps.
"""

import torch
from torch import Tensor

import lfcc_kernels as lk
from benchmarks import machine, peers
from benchmarks.cases.base import CELLS, SCALES, TEMPERATURE, Case, Step, compiled, features

STUDENT_CHANNELS, TEACHER_CHANNELS, GRIDS = (64, 128, 256, 512), (96, 192, 384, 768), (56, 28, 14, 7)


def cases(tiny: bool) -> list[Case]:
    if machine.HERE.device.type == "cuda":
        two_bytes = torch.bfloat16
        return [
            _resnet_under_swin("average", "fwd+bwd", tiny, 256, two_bytes, compile=True),
            _resnet_under_swin("average", "fwd", tiny, 256, two_bytes),
            _resnet_under_swin("learnable", "fwd+bwd", tiny, 256, two_bytes),
            *(_resnet_under_swin("average", "fwd+bwd", tiny, 128, dtype) for dtype in (two_bytes, torch.float32)),
            _resnet_under_swin("average", "fwd+bwd", tiny, 256),
        ]
    return [
        _resnet_under_swin("average", "fwd", tiny),
        _resnet_under_swin("average", "fwd+bwd", tiny, compile=True, memory=True),
        _resnet_under_swin("learnable", "fwd+bwd", tiny),
    ]


def memory_cases(tiny: bool) -> list[Case]:
    """Maps so small that a B x B matrix would show in the memory, at two batch sizes."""
    return [_small_maps(1024, tiny), _small_maps(2048, tiny)]


def _resnet_under_swin(
    student_filter: str,
    mode: str,
    tiny: bool,
    batch: int = 128,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    memory: bool = False,
) -> Case:
    batch, cut = (batch // 32, 16) if tiny else (batch, 1)
    students = [channels // cut for channels in STUDENT_CHANNELS]
    teachers = [channels // cut for channels in TEACHER_CHANNELS]
    learn = mode != "fwd"
    student_bytes, teacher_bytes = (
        dtype.itemsize * batch * sum(c * grid**2 for c, grid in zip(channels, GRIDS, strict=True))
        for channels in (students, teachers)
    )
    reads = 1 + learn + (learn and student_filter == "learnable")
    pooling = reads * student_bytes + teacher_bytes + dtype.itemsize * batch * CELLS * sum(students + teachers)
    contrast, projection = (4, 6) if learn else (2, 2)
    flops = sum(
        contrast * batch**2 * CELLS * t + projection * batch * CELLS * s * t
        for s, t in zip(students, teachers, strict=True)
    )
    maps = ("S", "2 S", "3 S")[reads - 1]
    return _case(
        student_filter,
        (batch, len(GRIDS), len(SCALES)),
        mode,
        students,
        teachers,
        GRIDS,
        dtype=dtype,
        compile=compile,
        steps=(Step(pooling), Step(flops=flops)),
        formula=f"{maps} + T + Y bytes, then {contrast} B^2 s^2 C_t + {projection} B s^2 C_s C_t FLOPs",
        memory=memory,
    )


def _small_maps(batch: int, tiny: bool) -> Case:
    shape = (batch // 32 if tiny else batch, 1, len(SCALES))
    return _case("small-maps", shape, "fwd+bwd", (32,), (32,), (4,), memory=True)


def _case(
    label: str,
    shape: tuple[int, int, int],
    mode: str,
    students: tuple[int, ...],
    teachers: tuple[int, ...],
    grids: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    **measured,
) -> Case:
    learnable = label == "learnable"
    torch.manual_seed(0)
    module = lk.LFCCLoss(
        students,
        teachers,
        scales=SCALES,
        temperature=TEMPERATURE,
        student_filter="learnable" if learnable else "average",
    ).to(machine.HERE.device)
    weights = [projection.weight for projection in module.student_projections]

    def split(maps: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return maps[: len(grids)], maps[len(grids) :]

    def ours(*maps: Tensor) -> Tensor:
        return module(*split(maps))

    def eager_backend(*maps: Tensor) -> Tensor:
        with lk.use_backend("eager"):
            return ours(*maps)

    def pooled(*maps: Tensor) -> Tensor:
        return peers.lfcc_pool_each_scale(*split(maps), weights, SCALES, TEMPERATURE)

    def projected(*maps: Tensor) -> Tensor:
        return peers.lfcc_project_maps(*split(maps), weights, SCALES, TEMPERATURE)

    def filtered(*maps: Tensor) -> Tensor:
        banks = zip(module.student_filters, grids, strict=True)
        filters = [low_pass.bank(grid, grid) for low_pass, grid in banks]
        return peers.lfcc_filter_each_scale(*split(maps), weights, filters, SCALES, TEMPERATURE)

    def inputs() -> tuple[Tensor, ...]:
        return tuple(
            features((shape[0], c, grid, grid), learn, dtype)
            for channels, learn in ((students, mode != "fwd"), (teachers, False))
            for c, grid in zip(channels, grids, strict=True)
        )

    eager = {"eager": filtered} if learnable else {"eager": projected, "eager, pooled first": pooled}
    others = eager | {"eager backend": eager_backend} | (compiled(eager) if compile else {})
    return Case(
        "lfcc",
        label,
        shape,
        mode,
        inputs,
        {"ours": ours, **others},
        dtype=dtype,
        parameters=tuple(module.parameters()),
        **measured,
    )
