"""The dtypes that all backends support, and the dtype in which each is accumulated."""

import torch

SUPPORTED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over elements of `dtype`: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
