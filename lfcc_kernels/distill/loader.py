"""Batches of images for training and evaluation, with timm's transforms.

Order and augmentation of an epoch follow from (seed, epoch) alone, not from the number of workers or from
where an epoch was taken up again: the order is drawn at once, with a seed for every image that its transform
starts from.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from .loop import Batch

Transform = Callable[[Image.Image], Tensor]


class TrainBatches:
    """Shuffled, augmented batches of (PIL image, label) pairs; what does not fill a batch is left out."""

    def __init__(
        self,
        dataset: Dataset,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._size, self._batch_size, self._seed, self._device = (
            len(dataset),
            batch_size,
            seed,
            torch.device(device),
        )
        self._items: list[tuple[int, int]] = []  # of the epoch to come; the loader reads it when an epoch begins
        self._loader = DataLoader(
            _SeededImages(dataset, transform),
            batch_size,
            sampler=self._items,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # its own, so that starting an epoch does not advance the global one
        )

    def __len__(self) -> int:
        return self._size // self._batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        rng = np.random.default_rng((self._seed, epoch))
        order, seeds = rng.permutation(self._size), rng.integers(2**32, size=self._size)
        self._items[:] = list(zip(order.tolist(), seeds.tolist(), strict=True))[first * self._batch_size :]
        for images, labels in self._loader:
            yield Batch(images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True))


class _SeededImages(Dataset):
    def __init__(self, dataset: Dataset, transform: Transform) -> None:
        self._dataset, self._transform = dataset, transform

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = item
        image, label = self._dataset[index]
        with _seeded(seed):
            return self._transform(image.convert("RGB")), label


class EvaluationImages(Dataset):
    """A dataset of (PIL image, label) under a transform without randomness."""

    def __init__(self, dataset: Dataset, transform: Transform) -> None:
        self._dataset, self._transform = dataset, transform

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._dataset[index]
        return self._transform(image.convert("RGB")), label


@torch.no_grad()
def top1(model: nn.Module, loader: DataLoader, num_classes: int) -> float:
    """Accuracy of a classifier in per cent; leaves it in evaluation mode."""
    device = next(model.parameters()).device
    metric = MulticlassAccuracy(num_classes, average="micro").to(device)
    model.eval()
    for images, labels in loader:
        metric.update(model(images.to(device)), labels.to(device))
    return 100 * metric.compute().item()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Start the generators that transforms draw from at `seed`, and put them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
    random.setstate(python)
    np.random.set_state(numpy)
