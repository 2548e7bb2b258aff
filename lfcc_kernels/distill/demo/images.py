"""The demonstration's images: held in memory as bytes, cut into batches, normalised on the way out."""

import sys
from collections.abc import Iterator

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip
from tqdm import tqdm

from lfcc_kernels.distill import Batch, TeacherOutputs
from lfcc_kernels.distill.data import ImageArrays

UNLABELLED = -100
# The statistics that timm's data config gives to a model without any of its own, such as the student.
_normalize = Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
_augment = Compose([RandomCrop(32, padding=4, padding_mode="reflect"), RandomHorizontalFlip()])


class Images:
    """Photographs (N, 3, 32, 32) uint8 and labels (N,), UNLABELLED where a label is not to be used."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    @classmethod
    def of(cls, dataset: ImageArrays) -> "Images":
        return cls(torch.from_numpy(dataset.images).permute(0, 3, 1, 2), torch.from_numpy(dataset.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> "Images":
        """A copy of some of the images."""
        return Images(self.pixels[indices].contiguous(), self.labels[indices])

    def batches(self, size: int, title: str | None = None) -> Iterator[Tensor]:
        """All images in order, normalised, (size, 3, 32, 32) at a time; with a `title`, progress is shown."""
        parts = self.pixels.split(size)
        for part in parts if title is None else _with_progress(parts, title):
            yield normalize(part)


class TrainingBatches:
    """Shuffled batches of `images` for `fit`: `updates` of them an epoch, however many images there are.

    Every image comes once before any comes twice. `teacher` holds the outputs for all images, in their order.
    `augment` shifts and mirrors the images, which the teacher has then not seen as they are.
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
        generator, drawn = torch.Generator().manual_seed(seed), size * updates * epochs
        rounds = [torch.randperm(len(images), generator=generator) for _ in range(-(-drawn // len(images)))]
        self._order = torch.cat(rounds)[:drawn].view(epochs, updates, size)

    def __len__(self) -> int:
        return self._order.shape[1]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        for chosen in self._order[epoch, first:]:
            pixels = self._images.pixels[chosen]
            if self._augment:
                pixels = torch.stack([_augment(image) for image in pixels])
            yield Batch(normalize(pixels), self._images.labels[chosen], self._taught(chosen))

    def _taught(self, chosen: Tensor) -> TeacherOutputs | None:
        if self._teacher is None:
            return None
        logits, pyramids = self._teacher
        return TeacherOutputs(logits[chosen], pyramids and [stage[chosen].float() for stage in pyramids])


def normalize(pixels: Tensor) -> Tensor:
    return _normalize(pixels / 255)


def _with_progress(parts: tuple[Tensor, ...], title: str) -> Iterator[Tensor]:
    """A bar on a terminal, a line for every tenth elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(parts, desc=title, unit="batch", leave=False)
        return
    for done, part in enumerate(parts, start=1):
        yield part
        if done * 10 // len(parts) > (done - 1) * 10 // len(parts):
            print(f"{title}: {done / len(parts):.0%}", flush=True)
