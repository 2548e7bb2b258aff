"""Fused kernels for low-frequency contrastive distillation (LFCC) between vision architectures."""

from lfcc_kernels.functional import info_nce, lowpass
from lfcc_kernels.losses import InfoNCELoss, LFCCLoss, LowPassPyramid
from lfcc_kernels.ops.dispatch import available_backends, use_backend

__version__ = "0.1.0"

__all__ = [
    "InfoNCELoss",
    "LFCCLoss",
    "LowPassPyramid",
    "available_backends",
    "info_nce",
    "lowpass",
    "use_backend",
]
