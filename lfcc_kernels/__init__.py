"""Fused kernels for low-frequency contrastive distillation (LFCC) between vision architectures."""

from lfcc_kernels.contrast import InfoNCELoss
from lfcc_kernels.filters import LowPassPyramid
from lfcc_kernels.functional import info_nce, info_nce_foreach, lowpass, lowpass_foreach
from lfcc_kernels.losses import LFCCLoss
from lfcc_kernels.ops.dispatch import available_backends, use_backend
from lfcc_kernels.version import __version__

__all__ = [
    "InfoNCELoss",
    "LFCCLoss",
    "LowPassPyramid",
    "__version__",
    "available_backends",
    "info_nce",
    "info_nce_foreach",
    "lowpass",
    "lowpass_foreach",
    "use_backend",
]
