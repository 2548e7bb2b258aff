"""The CUDA C++ kernels of the compiled library: on NVIDIA GPUs of compute capability 8.0 and newer.

Their overloads are defined in Python and served by `_C` where it was built with them. The tests load the same sources
compiled for the CPU, which then serve tensors there.
"""

import functools

import torch

from lfcc_kernels.backends import native, nvidia


@torch.compiler.assume_constant_result
def missing() -> str:
    """Why this backend cannot serve here, or an empty string."""
    return _why_missing()


@torch.compiler.assume_constant_result
def device() -> str:
    """Where the tensors must be."""
    return "cpu" if _serves("CPU") else "cuda"


@functools.cache
def _why_missing() -> str:
    if _serves("CPU"):
        return ""
    if native.missing:
        return native.missing
    if not _serves("CUDA"):
        return (
            "the compiled library has no CUDA kernels; install the CUDA toolkit (nvcc) and run "
            "`LFCC_BUILD_CUDA=1 pip install --no-build-isolation .` again"
        )
    return nvidia.missing()


@functools.cache
def _serves(key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("lfcc::lowpass.cuda", key)
