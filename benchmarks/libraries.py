"""Packages for a GPU that have the loss of `info_nce`, or one that can be made into it; with the normalisation
that their users write. Each is imported when it is called, so that one that is not installed is skipped.
"""

import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import labels


def memeff(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Locked-image tuning: the teacher is frozen. `stable` would scale the gradient by another factor."""
    from memeff import MemoryEfficientLiTLoss

    return MemoryEfficientLiTLoss(temperature, stable=False)(student, teacher)


def memeff_symmetric(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The loss of CLIP; it has no form with a frozen side, so the teacher's gradient is worked out too."""
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature, stable=False)(student, teacher)


def inf_cl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Inf-CL on one GPU. It works in float32 and TF32, and on the teacher's gradient too."""
    from inf_cl import cal_inf_loss

    queries, keys = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    head_dim = min(256, student.shape[1])  # the widest slice of a row that it takes
    return cal_inf_loss(queries / temperature, keys, labels=labels(queries), head_dim=head_dim)


def inf_cl_symmetric(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Both directions, as its page shows."""
    return (inf_cl(student, teacher, temperature) + inf_cl(teacher, student, temperature)) / 2


def cut_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cut your losses: the teacher is the classifier. Its filter drops every probability under 1/4096, which in
    a large batch are nearly all, so it is off."""
    from cut_cross_entropy import linear_cross_entropy

    queries, keys = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    return linear_cross_entropy(queries / temperature, keys, labels(queries), filter_eps=None)


def liger(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Liger's fused linear cross entropy: the teacher is the weight of the last layer."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    queries, keys = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    return liger_fused_linear_cross_entropy(queries / temperature, keys, labels(queries))


def open_clip(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """ClipLoss, which holds the B x B matrix once a direction."""
    from open_clip.loss import ClipLoss

    return ClipLoss()(F.normalize(student, dim=1), F.normalize(teacher, dim=1), 1 / temperature)
