"""What every backend for NVIDIA GPUs asks of one."""

import torch

NO_GPU = "torch finds no NVIDIA GPU"
OLDEST_CAPABILITY = (8, 0)  # the first with cp.async, and with products of bfloat16 on tensor cores


def missing() -> str:
    """Why no GPU can serve here, or an empty string."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return NO_GPU
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        return f"the GPU has compute capability {'.'.join(map(str, capability))}, and 8.0 is the least"
    return ""
