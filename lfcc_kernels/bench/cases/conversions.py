"""What users of the peers convert their inputs to first, by the inputs' dtype and the device that is measured."""

from functools import partial

import torch
from torch import Tensor

from lfcc_kernels.bench import machine, peers
from lfcc_kernels.bench.cases.base import Candidate, Converting


def raised(candidates: dict[str, Candidate], dtype: torch.dtype) -> dict[str, Candidate]:
    """The candidates, which are products; on a CPU two-byte elements are raised to float32 for them."""
    if not _two_bytes_on_cpu(dtype):
        return candidates
    return {name: Converting(call, peers.raised, "float32") for name, call in candidates.items()}


def unconverted(candidates: dict[str, Candidate], dtype: torch.dtype) -> dict[str, Candidate]:
    """Beside those, bfloat16 as it is, where the processor has instructions for it: without them it takes a hundred
    times longer. None where there is nothing to convert."""
    if not _two_bytes_on_cpu(dtype) or dtype != torch.bfloat16 or not torch.cpu._is_avx512_bf16_supported():
        return {}
    return {f"{name} in bfloat16": call for name, call in candidates.items()}


def in_two_bytes(call: Candidate, dtype: torch.dtype) -> Candidate:
    """The candidate, which on a GPU takes two-byte elements alone."""
    if machine.HERE.device.type == "cpu" or dtype.itemsize == 2:
        return call
    return Converting(call, partial(Tensor.to, dtype=torch.bfloat16), "bfloat16")


def _two_bytes_on_cpu(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2 and machine.HERE.device.type == "cpu"
