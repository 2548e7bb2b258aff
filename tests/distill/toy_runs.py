"""Small runs and files that the tests share."""

import io
import random
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from lfcc_kernels.distill import Batch, Distiller, FitSettings, RunFolder, build_lfcc, create_extractor, fit

CLASSES = 3


def make_distiller(seed: int = 0, **weights: float) -> Distiller:
    """A tiny ViT student with dropout and a tiny CNN teacher at 32 pixels."""
    torch.manual_seed(seed)
    student = create_extractor(
        timm.create_model("test_vit", num_classes=CLASSES, img_size=32, patch_size=8, proj_drop_rate=0.1),
        [1, 5],
        image_size=32,
    )
    teacher = create_extractor(timm.create_model("test_resnet", num_classes=CLASSES), [2, 3], image_size=32)
    lfcc = build_lfcc(student, teacher, scales=(1, 2), learnable_temperature=True)
    return Distiller(student, teacher, lfcc, **weights)


class ToyBatches:
    """Images of three brightnesses under noise from the global generator, as augmentation draws it."""

    def __init__(self, batches: int = 4, size: int = 8) -> None:
        self.batches, self.size = batches, size

    def __len__(self) -> int:
        return self.batches

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        labels = torch.randint(CLASSES, (self.batches, self.size), generator=torch.Generator().manual_seed(epoch))
        for batch in labels[first:]:
            yield Batch(batch[:, None, None, None] - 1 + 0.3 * torch.randn(self.size, 3, 32, 32), batch)


def no_evaluation(model: nn.Module) -> float:
    return 0.0


SETTINGS = FitSettings(
    epochs=3, lr=1e-3, warmup_epochs=1, clip_grad=1.0, model_ema=True, log_interval=2, checkpoint_interval=3
)


class Interrupted(Exception):
    pass


class InterruptedBatches:
    """Another source of batches that breaks off when it has given `updates` of them."""

    def __init__(self, batches, updates: int) -> None:
        self.batches, self.updates = batches, updates

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        for batch in self.batches.epoch(epoch, first):
            if self.updates == 0:
                raise Interrupted
            self.updates -= 1
            yield batch


def run(folder: Path, batches, checkpoint: dict | None = None, **settings) -> dict[str, float]:
    random.seed(0), np.random.seed(0)
    distiller = make_distiller()
    return fit(
        distiller, batches, no_evaluation, replace(SETTINGS, **settings), RunFolder(folder), checkpoint=checkpoint
    )


def write_tar(path: Path, files: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.read_bytes()
