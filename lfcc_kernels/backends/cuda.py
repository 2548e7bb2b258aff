"""Availability of the backend `cuda`: CUDA C++ kernels of the compiled library, for compute capability 8.0 or newer.

`lfcc_kernels.backends.schemas` defines the overloads and `_C` implements them if it was built with CUDA. The tests load
the same sources compiled for the CPU, which then implement the overloads for CPU tensors.
"""

import functools

import torch

from lfcc_kernels.backends import native, nvidia, schemas


@torch.compiler.assume_constant_result
def missing() -> str:
    """Why this backend is not available on this machine, or an empty string."""
    return _why_missing()


@torch.compiler.assume_constant_result
def device() -> str:
    """Type of the device that the tensors must be on."""
    return "cpu" if _implemented_for("CPU") else "cuda"


@functools.cache
def _why_missing() -> str:
    if _implemented_for("CPU"):
        return ""
    if native.missing:
        return native.missing
    if not _implemented_for("CUDA"):
        return (
            "the compiled library has no CUDA kernels; install the CUDA toolkit (nvcc) and rebuild with "
            "`LFCC_BUILD_CUDA=1 pip install --no-build-isolation .`"
        )
    return nvidia.missing()


@functools.cache
def _implemented_for(key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(schemas.qualified("lowpass", "cuda"), key)
