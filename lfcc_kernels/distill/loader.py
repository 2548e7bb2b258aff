"""Batches of images for training and evaluation, with timm's transforms.

Order, augmentation and mixing of an epoch follow from (seed, epoch), not from the number of workers or from where an
epoch was taken up again. The order is drawn at once for all ranks, with a seed for every image that its transform
starts from: N ranks with batches of b see what one process with batches of N * b sees. Only the pairs of mixup are
drawn by each rank for itself.
"""

from collections.abc import Iterator

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from .batches import Batch
from .cache import TeacherCache
from .ranks import gather_objects
from .readers import Stream
from .sampling import UNCOUNTED, PairMixup, Transform, loader_errors, outlive_sigterm, read_image, seeded
from .streams import EvaluationStream


class TrainBatches:
    """Shuffled, augmented batches of (PIL image, label) pairs; what does not fill a batch of all ranks is left out.

    - `batch_size` images a batch on this rank, of `world_size` such ranks.
    - `mix` mixes pairs of images within a batch: labels become (B, classes) float32, and both of a pair have one id,
      which no other pair of the epoch has on any rank.
    - `cache` has the teacher's outputs. `transform` is then the one that the cache was made with, without
      randomness, and its result is flipped left to right with probability `hflip`.

    Raises ValueError for an odd batch size with `mix`, for `mix` beside `cache`, and for flips that the cache lacks.
    Iterating raises LoaderError for an image that cannot be read and for a worker that died.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        mix: Mixup | None = None,
        cache: TeacherCache | None = None,
        hflip: float = 0.0,
    ) -> None:
        if cache is not None and mix is not None:
            raise ValueError("the teacher's cache has no mixed images: leave out mixup and cutmix, or the cache")
        if cache is not None and hflip and not cache.flips:
            raise ValueError("the teacher's cache has no flipped images: leave out the flips, or make it with them")
        self._size, self._batch_size, self._seed = len(dataset), batch_size, seed
        self._device, self._rank, self._world_size = torch.device(device), rank, world_size
        self._mix = mix and PairMixup(mix, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        self._cache = cache
        self._items: list[list[int]] = []  # of the epoch to come; the loader reads it when an epoch begins
        self._loader = DataLoader(
            _SeededImages(dataset, transform, cache, hflip),
            batch_size,
            sampler=self._items,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=outlive_sigterm,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # its own, so that starting an epoch does not advance the global one
        )

    def __len__(self) -> int:
        return self._size // (self._batch_size * self._world_size)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        rng = np.random.default_rng((self._seed, epoch))
        items = np.stack([rng.permutation(self._size), rng.integers(2**32, size=self._size)], axis=1)
        items = items[: len(self) * self._world_size * self._batch_size]
        batches = items.reshape(len(self), self._world_size, self._batch_size, 2)
        self._items[:] = batches[first:, self._rank].reshape(-1, 2).tolist()
        with loader_errors():
            for number, tensors in enumerate(self._loader, first):
                images, labels, *rows = (tensor.to(self._device, non_blocking=True) for tensor in tensors)
                if self._mix is not None:
                    yield self._mix(images, labels, epoch=epoch, batch=number)
                else:
                    yield Batch(images, labels, self._cache.outputs(*rows) if rows else None)


class _SeededImages(Dataset):
    def __init__(self, dataset: Dataset, transform: Transform, cache: TeacherCache | None, hflip: float) -> None:
        self._dataset, self._transform, self._cache, self._hflip = dataset, transform, cache, hflip

    def __getitem__(self, item: list[int]) -> tuple[Tensor, int] | tuple[Tensor, int, Tensor]:
        index, seed = item
        image, label = read_image(self._dataset, index)
        with seeded(seed):
            image = self._transform(image)
            if self._cache is None:
                return image, label
            flipped = np.random.rand() < self._hflip
        return image.flip(-1) if flipped else image, label, self._cache.row(index, flipped)


class EvaluationImages(Dataset):
    """A rank's share of a dataset of (PIL image, label) under a transform without randomness.

    Every rank has the same number: the last image fills up, with the label -100, which `top1` does not count.
    """

    def __init__(self, dataset: Dataset, transform: Transform, rank: int = 0, world_size: int = 1) -> None:
        self._dataset, self._transform, self._rank, self._world_size = dataset, transform, rank, world_size

    def __len__(self) -> int:
        return -(-len(self._dataset) // self._world_size)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        index, last = number * self._world_size + self._rank, len(self._dataset) - 1
        image, label = read_image(self._dataset, min(index, last))
        return self._transform(image), label if index <= last else UNCOUNTED


def evaluation_loader(
    dataset: Dataset | Stream,
    transform: Transform,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Batches of (images, labels) for `top1`: this rank's share, in as many batches as every other rank has.

    From a Stream every rank reads, and decodes, all images and keeps its share.
    """
    if isinstance(dataset, Stream):
        images: Dataset = EvaluationStream(dataset, transform, rank, world_size)
    else:
        images = EvaluationImages(dataset, transform, rank, world_size)
    return DataLoader(
        images, batch_size, num_workers=workers, worker_init_fn=outlive_sigterm, generator=torch.Generator()
    )


@torch.no_grad()
def top1(model: nn.Module, loader: DataLoader, num_classes: int) -> float:
    """Accuracy in per cent over all ranks of `model`, which maps images to logits; leaves it in evaluation mode.

    Raises LoaderError where an image cannot be read, or a Stream holds more or fewer images than it says.
    """
    device, counted = next(model.parameters()).device, 0
    accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=UNCOUNTED).to(device)
    model.eval()
    with loader_errors():
        for images, labels in loader:
            accuracy.update(model(images.to(device)), labels.to(device))
            counted += int((labels != UNCOUNTED).sum())
    if isinstance(loader.dataset, EvaluationStream):
        loader.dataset.require(sum(gather_objects(counted)))
    return 100 * accuracy.compute().item()
