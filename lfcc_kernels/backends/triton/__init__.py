"""Triton kernels for both ops: on NVIDIA GPUs of compute capability 8.0 and newer, or in Triton's interpreter on CPU.

This package imports Triton when the first kernel is called, so that it can be imported without Triton.
"""

import functools
import importlib.util
import os

import torch

from lfcc_kernels.backends import nvidia

# Triton reads the variable when a kernel is decorated, so it must be set before the first one runs.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

DEVICE = "cpu" if INTERPRET else "cuda"  # of the tensors that the kernels accept


@torch.compiler.assume_constant_result
def missing() -> str:
    """Why this backend is not available, or an empty string."""
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
