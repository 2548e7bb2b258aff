"""Peers from other packages, which compute the loss of `info_nce` or the pyramid of `lowpass`.

Contrastive losses include the normalisation that their users write. Each package is imported by its call, so a missing
one is skipped; one that cannot run raises before it is imported.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfcc_kernels.bench.peers.contrast import labels
from lfcc_kernels.bench.peers.pooling import pool_by_halving


def memeff(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Locked-image tuning, with a frozen teacher. `stable=True` would scale the gradient by another factor."""
    _need_gpu("memeff", student)
    from memeff import MemoryEfficientLiTLoss

    return MemoryEfficientLiTLoss(temperature, stable=False)(student, teacher)


def memeff_symmetric(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """CLIP's loss. It does not support a frozen side, so it computes the teacher's gradient too."""
    _need_gpu("memeff", student)
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature, stable=False)(student, teacher)


def inf_cl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Inf-CL on one GPU. It computes in float32 and TF32, and computes the teacher's gradient too."""
    _need_gpu("inf-cl", student)
    from inf_cl import cal_inf_loss

    queries, keys = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    head_dim = min(256, student.shape[1])  # the widest slice of a row that it supports
    return cal_inf_loss(queries / temperature, keys, labels=labels(queries), head_dim=head_dim)


def inf_cl_symmetric(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Both directions, as in its README."""
    return (inf_cl(student, teacher, temperature) + inf_cl(teacher, student, temperature)) / 2


def cut_cross_entropy(student: Tensor, teacher: Tensor, temperature: float, compile: bool = True) -> Tensor:
    """Cut your losses, with the teacher as the classifier.

    On a GPU it supports 16-bit elements only; on a CPU it is a function that torch compiles. Its filter drops every
    probability under 1/4096, which in a large batch are nearly all, so it is off.
    """
    on_gpu = student.device.type == "cuda"
    if not (on_gpu or compile):
        raise NotImplementedError("cut-cross-entropy compiles on a CPU, so only a full benchmark runs it there")
    from cut_cross_entropy import linear_cross_entropy

    queries, keys = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    form = {"impl": "cce", "filter_eps": None} if on_gpu else {"impl": "torch_compile"}
    return linear_cross_entropy(queries / temperature, keys, labels(queries), **form)


def liger(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Liger's fused linear cross entropy, with the teacher as the weight of the last layer."""
    _need_gpu("liger-kernel", student)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    queries, keys = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    return liger_fused_linear_cross_entropy(queries / temperature, keys, labels(queries))


def open_clip(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """ClipLoss, which stores the B x B logits once per direction."""
    from open_clip.loss import ClipLoss

    return ClipLoss()(F.normalize(student, dim=1), F.normalize(teacher, dim=1), 1 / temperature)


def pytorch_metric_learning(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """NTXentLoss with the teacher's rows as references."""
    _need_few_rows(len(student))
    from pytorch_metric_learning.losses import NTXentLoss

    pairs = labels(student)
    return NTXentLoss(temperature)(student, pairs, ref_emb=teacher, ref_labels=pairs.clone())


def pytorch_metric_learning_nt_xent(view: Tensor, other: Tensor, temperature: float) -> Tensor:
    """The same loss of two views, each row against all others of both views."""
    _need_few_rows(2 * len(view))
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return SelfSupervisedLoss(NTXentLoss(temperature))(view, other)


def lightly_nt_xent(view: Tensor, other: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss over four B x B blocks."""
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature)(view, other)


def kornia(x: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Repeated blur pooling with the shortest filter, a mean of 2 x 2."""
    from kornia.filters import blur_pool2d

    return pool_by_halving(x, scales, functools.partial(blur_pool2d, kernel_size=2))


def antialiased_cnns(x: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Repeated blur pooling with the shortest filter, a mean of 2 x 2."""
    return pool_by_halving(x, scales, _blur_pool(x.shape[1], x.dtype, x.device))


@functools.cache
def _blur_pool(channels: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Created once, like a layer of a network."""
    from antialiased_cnns import BlurPool

    return BlurPool(channels, filt_size=2, stride=2).to(device, dtype)


def _need_gpu(name: str, x: Tensor) -> None:
    if x.device.type != "cuda":
        raise NotImplementedError(f"{name} needs an NVIDIA GPU")


def _need_few_rows(rows: int) -> None:
    if rows > 256:
        raise NotImplementedError(
            f"pytorch-metric-learning needs O(B^3) memory, so it runs on up to 256 rows, not {rows}"
        )
