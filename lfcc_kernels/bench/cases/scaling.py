"""Suite `scaling`: time and memory against one size at a time: B, D, H * W, the number of scales, the number of ranks.

B and D of the one-way contrast with a frozen teacher; B of the whole loss on small maps; H * W of the low-pass at
constant B * C; scales of the low-pass on one map, with their number at the end of the shape. Ranks, whose number begins
the shape, scale weakly: each has its own rows and contrasts them with the keys of all, so the work per rank grows.
Counted as in `lowpass` and `info_nce`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import lfcc_kernels as lk
from lfcc_kernels.bench import ranks
from lfcc_kernels.bench.cases import lfcc
from lfcc_kernels.bench.cases.base import SCALES, TEMPERATURE, Candidate, Case, Step, features, rows
from lfcc_kernels.bench.machine import Machine
from lfcc_kernels.bench.peers import contrast, pooling

MANY_SCALES = (1, 2, 4, 7, 14)


def cases(machine: Machine, dtype: torch.dtype | None) -> list[Case]:
    if machine.gpu:
        dtype = dtype or torch.bfloat16
        batches, whole_batches, dims = [256, 1024, 4096, 16384, 65536], [512, 2048, 8192], [128, 512, 2048, 4096]
        fixed_batch, sides, maps, rows_per_rank = 8192, [7, 14, 28, 56, 112], 256, 8192
    else:
        dtype = dtype or torch.float32
        batches, whole_batches, dims = [64, 256, 1024, 4096], [128, 512, 2048], [128, 512, 2048, 4096]
        fixed_batch, sides, maps, rows_per_rank = 512, [7, 14, 28, 56], 32, 512
    lowpass = partial(_lowpass, machine, dtype)
    return [
        *(_contrast(machine, dtype, "over-B", (b, 512), axis="B", x=b) for b in batches),
        *(_contrast(machine, dtype, "over-D", (fixed_batch, d), axis="D", x=d) for d in dims),
        *(_whole_loss(machine, dtype, b) for b in whole_batches),
        *(lowpass("over-HW", (maps, 256, s, s), SCALES, axis="H*W", x=s**2) for s in sides),
        *(
            lowpass("over-scales", (maps, 256, 56, 56, n), MANY_SCALES[:n], axis="scales", x=n)
            for n in range(1, len(MANY_SCALES) + 1)
        ),
        *(_across_ranks(machine, dtype, n, (rows_per_rank, 512)) for n in (1, 2, 4)),
    ]


def _contrast(machine: Machine, dtype: torch.dtype, label: str, shape: tuple[int, int], **options) -> Case:
    shape = _narrow(machine, shape)
    calls: dict[str, Candidate] = {
        "lfcc": lk.info_nce,
        "eager": contrast.dense,
        "linear_cross_entropy": contrast.linear_cross_entropy,
    }
    candidates: dict[str, Candidate] = {name: partial(call, temperature=TEMPERATURE) for name, call in calls.items()}
    moved, pairs = 3 * math.prod(shape) * dtype.itemsize, shape[0] ** 2
    steps, formula = (Step(moved, 4 * pairs * shape[1]),), "4 B^2 D FLOPs"
    options |= {"dtype": dtype, "op": "info_nce", "size": pairs, "memory": True, "heaps": False}
    inputs = partial(rows, machine, shape, True, dtype)
    return Case("scaling", f"info_nce-{label}", shape, "fwd+bwd", inputs, candidates, steps, formula, **options)


def _whole_loss(machine: Machine, dtype: torch.dtype, batch: int) -> Case:
    case = lfcc.small_maps(machine, batch, dtype)
    return replace(case, suite="scaling", label="lfcc-over-B", axis="B", x=batch)


def _lowpass(
    machine: Machine, dtype: torch.dtype, label: str, shape: tuple[int, ...], scales: Sequence[int], **options
) -> Case:
    shape = (2, 8, *shape[2:]) if machine.tiny else shape
    whole = shape[:4]
    cells = sum(scale**2 for scale in scales)

    @cache
    def matrix(like: torch.dtype) -> Tensor:
        return pooling.stacked_averages(whole[2:], scales).to(machine.device, like)

    def one_gemm(x: Tensor) -> Tensor:
        return pooling.one_gemm(x, matrix(contrast.upcast(x[:0]).dtype))

    def inputs() -> tuple[Tensor]:
        return (features(machine, whole, True, dtype),)

    lowpass, eager = partial(lk.lowpass, scales=scales), partial(pooling.pool_each_scale, scales=scales)
    candidates: dict[str, Candidate] = {"lfcc": lowpass, "eager": eager, "one-GEMM": one_gemm}
    moved = 2 * (math.prod(whole) + math.prod(whole[:2]) * cells) * dtype.itemsize
    steps, formula = (Step(moved),), "2 X + 2 Y bytes"
    options |= {"dtype": dtype, "op": "lowpass", "size": math.prod(whole), "memory": True, "heaps": False}
    return Case("scaling", f"lowpass-{label}", shape, "fwd+bwd", inputs, candidates, steps, formula, **options)


@dataclass(frozen=True)
class _AcrossRanks(Case):
    """A case whose call ends when all ranks have finished theirs."""

    world: ranks.World = field(kw_only=True)

    def run(self, call: Candidate, inputs: Sequence[Tensor], upstream: Tensor | None) -> tuple[Tensor, ...]:
        results = super().run(call, inputs, upstream)
        self.world.wait()
        return results


def _across_ranks(machine: Machine, dtype: torch.dtype, number: int, shape: tuple[int, int]) -> Case:
    shape = _narrow(machine, shape)
    make_rows = partial(rows, machine, shape, True, dtype)
    world = ranks.World(machine.device, number, make_rows)
    losses = {"lfcc": ranks.lfcc, "eager": ranks.eager, "linear_cross_entropy": ranks.linear_cross_entropy}
    candidates = {name: world.candidate(partial(loss, temperature=TEMPERATURE)) for name, loss in losses.items()}
    options: dict[str, Any] = {"dtype": dtype, "axis": "ranks", "x": number, "memory": True, "heaps": False}
    label, all_rows = "info_nce-over-ranks", (number, *shape)
    return _AcrossRanks(
        "scaling", label, all_rows, "fwd+bwd", make_rows, candidates, world=world, close=world.close, **options
    )


def _narrow(machine: Machine, shape: tuple[int, int]) -> tuple[int, int]:
    return (shape[0] // 32, shape[1] // 16) if machine.tiny else shape
