"""Images in memory: normalised batches for the teacher, and training batches for `fit`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip
from tqdm import tqdm

from lfcc_kernels.distill import Batch, TeacherOutputs
from lfcc_kernels.distill.data import ImageArrays

UNLABELLED = -100  # the label that the loss ignores
# timm's data config uses these statistics for a model without its own, such as the student.
_normalize = Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
_augment = Compose([RandomCrop(32, padding=4, padding_mode="reflect"), RandomHorizontalFlip()])


@dataclass
class Images:
    """Pixels (N, 3, 32, 32) uint8 and labels (N,); UNLABELLED hides a label."""

    pixels: Tensor
    labels: Tensor

    @classmethod
    def of(cls, dataset: ImageArrays) -> "Images":
        return cls(torch.from_numpy(dataset.images).permute(0, 3, 1, 2), torch.from_numpy(dataset.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> "Images":
        """A copy of the images at `indices`."""
        return Images(self.pixels[indices].contiguous(), self.labels[indices])

    def batches(self, size: int, title: str | None = None) -> Iterator[Tensor]:
        """Normalised batches (size, 3, 32, 32) of all images in order; `title` shows progress."""
        parts = self.pixels.split(size)
        on_terminal = sys.stderr.isatty()
        bar = tqdm(parts, desc=title, unit="batch", leave=False, disable=title is None or not on_terminal)
        for done, part in enumerate(bar, start=1):
            yield normalize(part)
            if title and not on_terminal and done * 10 // len(parts) > (done - 1) * 10 // len(parts):
                print(f"{title}: {done / len(parts):.0%}", flush=True)


class TrainingBatches:
    """Source of shuffled batches for `fit`: `updates` batches per epoch, independent of the number of images.

    Every image is used once before any image is used twice. `teacher` contains the outputs for all images in order.
    `augment` crops and flips the images; it cannot be combined with `teacher`, whose outputs are for unchanged images.
    """

    def __init__(
        self,
        images: Images,
        *,
        size: int,
        updates: int,
        epochs: int,
        seed: int,
        teacher: TeacherOutputs | None = None,
        augment: bool = False,
    ) -> None:
        self._images, self._teacher, self._augment = images, teacher, augment
        generator, total = torch.Generator().manual_seed(seed), size * updates * epochs
        rounds = [torch.randperm(len(images), generator=generator) for _ in range(-(-total // len(images)))]
        self._order = torch.cat(rounds)[:total].view(epochs, updates, size)

    def __len__(self) -> int:
        return self._order.shape[1]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        for indices in self._order[epoch, first:]:
            pixels, teacher = self._images.pixels[indices], None
            if self._augment:
                pixels = torch.stack([_augment(image) for image in pixels])
            if self._teacher is not None:
                logits, pyramids = self._teacher
                teacher = TeacherOutputs(logits[indices], pyramids and [stage[indices].float() for stage in pyramids])
            yield Batch(normalize(pixels), self._images.labels[indices], teacher)


def normalize(pixels: Tensor) -> Tensor:
    return _normalize(pixels / 255)
