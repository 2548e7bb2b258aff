"""Shared by the launchers of both ops: properties of the GPU, and the dtypes of products and accumulators."""

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from lfcc_kernels.backends.triton import INTERPRET


@dataclass(frozen=True)
class DeviceProps:
    """The properties that the choice of tiles depends on."""

    capability: int  # which table is used: 90 for compute capability 9.0; 0 in the interpreter
    multiprocessors: int
    l2_bytes: int


@functools.cache
def device_props(device: torch.device) -> DeviceProps:
    if INTERPRET:
        return DeviceProps(0, 1, 1 << 20)
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    # Consumer GPUs have less shared memory than the tiles of newer tables need.
    if properties.shared_memory_per_block_optin < 160 << 10:
        capability = 80
    return DeviceProps(capability, properties.multi_processor_count, properties.L2_cache_size)


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Context in which the tensor's device is the current one, where Triton launches."""
    return nullcontext() if INTERPRET else torch.cuda.device(tensor.device)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which elements of `dtype` are multiplied.

    The interpreter stores bfloat16 as bit patterns and would multiply those, so it widens 16-bit elements to float32.
    """
    return torch.float32 if INTERPRET and dtype != torch.float64 else dtype


def to_tl_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


def precision(dtype: torch.dtype, as_matmul: bool) -> str:
    """`input_precision` of tl.dot: 3xTF32, which preserves nearly all digits of float32 on tensor cores, or plain TF32
    for products to which torch's own matmul setting applies."""
    if INTERPRET or dtype != torch.float32:
        return "ieee"
    return "tf32" if as_matmul and _allows_tf32() else "tf32x3"


def _allows_tf32() -> bool:
    setting = torch.backends.cuda.matmul.fp32_precision
    return (torch.backends.fp32_precision if setting == "none" else setting) == "tf32"
