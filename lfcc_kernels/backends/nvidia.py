"""Requirements on a GPU that the backends `triton` and `cuda` share."""

import torch

NO_GPU = "torch finds no NVIDIA GPU"
OLDEST_CAPABILITY = (8, 0)  # the first with cp.async and with bfloat16 products on tensor cores


def missing() -> str:
    """Why the current GPU cannot be used, or an empty string."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return NO_GPU
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        return f"the GPU has compute capability {'.'.join(map(str, capability))}; the kernels need 8.0 or newer"
    return ""
