"""What the peers share."""

import torch
from torch import Tensor


def raised(x: Tensor) -> Tensor:
    """`x`, as float32 where its elements have two bytes and are on a CPU: most processors multiply those slowly."""
    return x.float() if x.element_size() == 2 and x.device.type == "cpu" else x


def labels(rows: Tensor) -> Tensor:
    """Each row's positive is its own partner."""
    return torch.arange(len(rows), device=rows.device)
