"""Two rows of next to nothing: what a call costs before it works. Inputs stay in cache."""

import math
from functools import partial

import torch

import lfcc_kernels as lk
from lfcc_kernels.bench import peers
from lfcc_kernels.bench.cases.base import MODES, SCALES, TEMPERATURE, Candidate, Case, features, rows
from lfcc_kernels.bench.cases.conversions import raised


def cases(tiny: bool, dtype: torch.dtype | None) -> list[Case]:
    calls, dtype = 20 if tiny else 200, dtype or torch.float32
    return [case for mode in MODES for case in (_lowpass(mode, calls, dtype), _info_nce(mode, calls, dtype))]


def _lowpass(mode: str, calls: int, dtype: torch.dtype) -> Case:
    shape = (2, 8, 8, 8)
    return Case(
        "overhead",
        "lowpass",
        shape,
        mode,
        lambda: (features(shape, mode != "fwd", dtype),),
        {"ours": partial(lk.lowpass, scales=SCALES), "eager": partial(peers.pool_each_scale, scales=SCALES)},
        dtype=dtype,
        calls=calls,
        quick=mode == "fwd",
        op="lowpass",
        size=math.prod(shape),
    )


def _info_nce(mode: str, calls: int, dtype: torch.dtype) -> Case:
    shape = (2, 8)
    eager: dict[str, Candidate] = {"eager": partial(peers.contrast_dense, temperature=TEMPERATURE)}
    return Case(
        "overhead",
        "info_nce",
        shape,
        mode,
        lambda: rows(shape, mode != "fwd", dtype),
        {"ours": partial(lk.info_nce, temperature=TEMPERATURE), **raised(eager, dtype)},
        dtype=dtype,
        calls=calls,
        quick=mode == "fwd",
        op="info_nce",
        size=shape[0] ** 2,
    )
