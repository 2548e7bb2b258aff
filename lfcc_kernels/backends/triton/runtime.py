"""What both ops' launchers share: the chip they run on, and the types in which products and sums are taken."""

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from lfcc_kernels.backends.triton import INTERPRET


@dataclass(frozen=True)
class Chip:
    """What the choice of tiles depends on."""

    capability: int  # whose table serves: 90 for compute capability 9.0; 0 in the interpreter
    multiprocessors: int
    l2_bytes: int


@functools.cache
def chip(device: torch.device) -> Chip:
    if INTERPRET:
        return Chip(0, 1, 1 << 20)
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    # Consumer chips have less shared memory than tiles of the newer tables take.
    if properties.shared_memory_per_block_optin < 160 << 10:
        capability = 80
    return Chip(capability, properties.multi_processor_count, properties.L2_cache_size)


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return nullcontext() if INTERPRET else torch.cuda.device(tensor.device)


def raised(dtype: torch.dtype) -> torch.dtype:
    """The type in which elements of `dtype` are multiplied.

    The interpreter keeps bfloat16 as bit patterns and would compute with those, so there two bytes become four.
    """
    return torch.float32 if INTERPRET and dtype != torch.float64 else dtype


def in_triton(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


def precision(dtype: torch.dtype, as_matmul: bool) -> str:
    """`input_precision` of tl.dot: three TF32 products keep nearly all digits of float32 on tensor cores, one is for
    products that torch's own setting allows it for."""
    if INTERPRET or dtype != torch.float32:
        return "ieee"
    return "tf32" if as_matmul and _allows_tf32() else "tf32x3"


def _allows_tf32() -> bool:
    setting = torch.backends.cuda.matmul.fp32_precision
    return (torch.backends.fp32_precision if setting == "none" else setting) == "tf32"
