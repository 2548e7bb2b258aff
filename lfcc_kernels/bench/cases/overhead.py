"""Suite `overhead`: two rows of little data, so that a call costs its overhead alone. Inputs stay in cache."""

import math
from functools import partial

import torch

import lfcc_kernels as lk
from lfcc_kernels.bench import peers
from lfcc_kernels.bench.cases.base import MODES, SCALES, TEMPERATURE, Candidate, Case, features, rows, upcast_on_cpu
from lfcc_kernels.bench.machine import Machine


def cases(machine: Machine, dtype: torch.dtype | None) -> list[Case]:
    dtype = dtype or torch.float32
    return [case for mode in MODES for case in (_lowpass(machine, mode, dtype), _info_nce(machine, mode, dtype))]


def _lowpass(machine: Machine, mode: str, dtype: torch.dtype) -> Case:
    shape = (2, 8, 8, 8)
    return Case(
        "overhead",
        "lowpass",
        shape,
        mode,
        lambda: (features(machine, shape, mode != "fwd", dtype),),
        {"ours": partial(lk.lowpass, scales=SCALES), "eager": partial(peers.pool_each_scale, scales=SCALES)},
        dtype=dtype,
        calls=20 if machine.tiny else 200,
        quick=mode == "fwd",
        op="lowpass",
        size=math.prod(shape),
    )


def _info_nce(machine: Machine, mode: str, dtype: torch.dtype) -> Case:
    shape = (2, 8)
    eager: dict[str, Candidate] = {"eager": partial(peers.contrast_dense, temperature=TEMPERATURE)}
    return Case(
        "overhead",
        "info_nce",
        shape,
        mode,
        lambda: rows(machine, shape, mode != "fwd", dtype),
        {"ours": partial(lk.info_nce, temperature=TEMPERATURE), **upcast_on_cpu(machine, eager, dtype)},
        dtype=dtype,
        calls=20 if machine.tiny else 200,
        quick=mode == "fwd",
        op="info_nce",
        size=shape[0] ** 2,
    )
