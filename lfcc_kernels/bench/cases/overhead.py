"""Suite `overhead`: two rows of little data, so that a call costs its overhead alone. Inputs stay in cache."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lfcc_kernels as lk
from lfcc_kernels.bench.cases.base import MODES, SCALES, TEMPERATURE, Candidate, Case, features, rows, upcast_on_cpu
from lfcc_kernels.bench.machine import Machine
from lfcc_kernels.bench.peers import contrast, pooling


def cases(machine: Machine, dtype: torch.dtype | None) -> list[Case]:
    return [case for mode in MODES for case in _both_ops(machine, mode, dtype or torch.float32)]


def _both_ops(machine: Machine, mode: str, dtype: torch.dtype) -> tuple[Case, Case]:
    common: dict[str, Any] = {"dtype": dtype, "calls": 20 if machine.tiny else 200, "quick": mode == "fwd"}
    map_shape, rows_shape = (2, 8, 8, 8), (2, 8)
    lowpass: dict[str, Candidate] = {
        "lfcc": partial(lk.lowpass, scales=SCALES),
        "eager": partial(pooling.pool_each_scale, scales=SCALES),
    }
    eager = upcast_on_cpu(machine, {"eager": partial(contrast.dense, temperature=TEMPERATURE)}, dtype)
    info_nce: dict[str, Candidate] = {"lfcc": partial(lk.info_nce, temperature=TEMPERATURE), **eager}

    def one_map() -> tuple[Tensor]:
        return (features(machine, map_shape, mode != "fwd", dtype),)

    def two_rows() -> tuple[Tensor, Tensor]:
        return rows(machine, rows_shape, mode != "fwd", dtype)

    return (
        Case(
            "overhead", "lowpass", map_shape, mode, one_map, lowpass, op="lowpass", size=math.prod(map_shape), **common
        ),
        Case(
            "overhead",
            "info_nce",
            rows_shape,
            mode,
            two_rows,
            info_nce,
            op="info_nce",
            size=rows_shape[0] ** 2,
            **common,
        ),
    )
