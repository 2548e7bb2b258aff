"""The models and pairs of OFA-KD (Hao et al., arXiv 2310.19444), the protocol of distillation between architectures.

Stages are those that `lfcc distill` taps by default at 224 x 224 pixels, in the layout that timm's blocks give them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lfcc_kernels.bench.cases.base import features

PYRAMID, FLAT = (56, 28, 14, 7), (14, 14, 14, 14)


@dataclass(frozen=True)
class Model:
    """A model's four stages.

    `layout` is "nchw" or "channels_last" for maps, "tokens" for tokens (B, N, C), and "channels_first_tokens" for
    tokens that lie in memory as (B, C, N).
    """

    timm: str  # its name there
    channels: tuple[int, ...]
    grids: tuple[int, ...] = PYRAMID
    layout: str = "nchw"
    prefix_tokens: int = 0

    def features(self, batch: int, learn: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Random features of all stages."""
        return tuple(
            self._stage(batch, channels, grid, dtype).requires_grad_(learn)
            for channels, grid in zip(self.channels, self.grids, strict=True)
        )

    def narrow(self, by: int) -> "Model":
        """The model with a fraction of its channels."""
        return replace(self, channels=tuple(channels // by for channels in self.channels))

    def _stage(self, batch: int, channels: int, grid: int, dtype: torch.dtype) -> Tensor:
        tokens = self.prefix_tokens + grid**2
        match self.layout:
            case "tokens":
                return features((batch, tokens, channels), False, dtype)
            case "channels_first_tokens":
                return features((batch, channels, tokens), False, dtype).transpose(1, 2)
        memory_format = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        return features((batch, channels, grid, grid), False, dtype, memory_format)


_SWIN = "swin_tiny_patch4_window7_224"
MODELS = {
    "resnet18": Model("resnet18", (64, 128, 256, 512)),
    "resnet50": Model("resnet50", (256, 512, 1024, 2048)),
    # OFA-KD takes the last stage behind the convolution of the head, 1280 wide. timm's feature_info, and so
    # `lfcc distill`, ends before it.
    "mobilenetv2": Model("mobilenetv2_100", (24, 32, 96, 320)),
    "convnext_t": Model("convnext_tiny", (96, 192, 384, 768), layout="channels_last"),
    "swin_t": Model(_SWIN, (96, 192, 384, 768), layout="channels_last"),
    # OFA-KD's own, which timm's class makes with embed_dim 64 and 48 and depths (2, 2, 2, 2).
    "swin_n": Model(_SWIN, (64, 128, 256, 512), layout="channels_last"),
    "swin_p": Model(_SWIN, (48, 96, 192, 384), layout="channels_last"),
    "deit_t": Model("deit_tiny_patch16_224", (192,) * 4, FLAT, "tokens", prefix_tokens=1),
    "vit_s": Model("vit_small_patch16_224", (384,) * 4, FLAT, "tokens", prefix_tokens=1),
    "mixer_b16": Model("mixer_b16_224", (768,) * 4, FLAT, "channels_first_tokens"),
    "resmlp_12": Model("resmlp_12_224", (384,) * 4, FLAT, "channels_first_tokens"),
}

# (student, teacher): the 12 pairs on CIFAR-100 and the 15 on ImageNet, of which 8 are the same.
PAIRS = tuple(
    (student, teacher)
    for students, teachers in (
        (("resnet18", "mobilenetv2"), ("swin_t", "vit_s", "deit_t", "mixer_b16")),
        (("deit_t",), ("convnext_t", "mixer_b16", "resnet50")),
        (("swin_p",), ("convnext_t", "mixer_b16")),
        (("swin_n",), ("convnext_t", "mixer_b16", "resnet50")),
        (("resmlp_12",), ("convnext_t", "swin_t", "resnet50")),
    )
    for student in students
    for teacher in teachers
)
