"""Triton kernels for both ops: on NVIDIA GPUs of compute capability 8.0 and newer, or in Triton's interpreter on CPU.

Nothing here imports Triton before a kernel is asked for, so that the package imports without it.
"""

import functools
import importlib.util
import os

import torch

from lfcc_kernels.backends import nvidia

# Triton reads this when it decorates a kernel, so it counts only where it was set before the first one ran.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

DEVICE = "cpu" if INTERPRET else "cuda"  # where the tensors must be


@torch.compiler.assume_constant_result
def missing() -> str:
    """Why this backend cannot serve here, or an empty string."""
    return _why_missing()


@functools.cache
def _why_missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with torch for CUDA on Linux"
    if INTERPRET:
        return ""
    reason = nvidia.missing()
    if reason == nvidia.NO_GPU:
        reason += "; TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, slowly"
    return reason
