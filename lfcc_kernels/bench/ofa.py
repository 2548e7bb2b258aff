"""The models and pairs of OFA-KD (Hao et al., arXiv 2310.19444), the protocol of distillation between architectures.

Stages are the default taps of `lfcc distill` at 224 x 224 pixels, in the layout of timm's blocks. The cost model uses
their widths, the suites `lfcc` and `step` their shapes.
"""

from dataclasses import dataclass, replace

PYRAMID, FLAT = (56, 28, 14, 7), (14, 14, 14, 14)


@dataclass(frozen=True)
class Model:
    """The stages of a model.

    `layout` is "nchw" or "channels_last" for maps, "tokens" for tokens (B, N, C), and "channels_first_tokens" for
    tokens stored as (B, C, N).
    """

    timm: str  # its name in timm
    channels: tuple[int, ...]
    grids: tuple[int, ...] = PYRAMID
    layout: str = "nchw"
    prefix_tokens: int = 0

    def narrow(self, by: int) -> "Model":
        """The model with its channels divided by `by`."""
        return replace(self, channels=tuple(channels // by for channels in self.channels))


_SWIN = "swin_tiny_patch4_window7_224"
MODELS = {
    "resnet18": Model("resnet18", (64, 128, 256, 512)),
    "resnet50": Model("resnet50", (256, 512, 1024, 2048)),
    # OFA-KD's last stage is the 1280-wide convolution of the head. timm's feature_info, and so `lfcc distill`, ends
    # before it.
    "mobilenetv2": Model("mobilenetv2_100", (24, 32, 96, 320)),
    "convnext_t": Model("convnext_tiny", (96, 192, 384, 768), layout="channels_last"),
    "swin_t": Model(_SWIN, (96, 192, 384, 768), layout="channels_last"),
    # OFA-KD's own models, which timm's class builds with embed_dim 64 and 48 and depths (2, 2, 2, 2).
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
