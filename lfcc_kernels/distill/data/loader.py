"""Training batches: what a batch contains, the common part of their sources, and those of map-style data sets."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lfcc_kernels.distill.distiller import TeacherOutputs
from lfcc_kernels.distill.teacher_cache import TeacherCache

from .readers import ImageDataset, ignore_sigterm, loader_errors, read_image

Transform = Callable[[Image.Image], Tensor]


class Batch(NamedTuple):
    """A training batch of one rank.

    images: (B, 3, H, W).
    labels: (B,) int64 with -100 for an unlabelled image, or probabilities (B, classes).
    teacher: the teacher's outputs if they are cached; otherwise the teacher runs on `images`.
    ids: (B,) int64; images with equal ids are not negatives of each other.
    """

    images: Tensor
    labels: Tensor
    teacher: TeacherOutputs | None = None
    ids: Tensor | None = None


class Batches(Protocol):
    """A source of training batches for `fit`.

    `len` is the number of batches per epoch. `epoch(epoch, first)` iterates over the batches of an epoch, starting at
    batch number `first`, on the distiller's device. Their order must depend on the epoch only. Iterating may draw from
    the global generators, but skipping to `first` must not. All ranks have equally many batches of equal size.
    """

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]: ...


class BatchSource:
    """Base class of `TrainBatches` and `StreamedBatches`.

    Args:
        size: number of images in the data set. Images that do not fill a batch on all ranks are dropped.
        batch_size: images per batch on this rank.
        seed: seed of order, augmentation and mixing.
        workers: number of loader processes; 0 loads in the main process.
        device: device of the batches.
        rank, world_size: this rank and the number of ranks.
        mix: mixes pairs of images within a batch. Labels become (B, classes) float32 and both images of a pair get the
            same id, which no other pair of the epoch has on any rank. Raises ValueError for an odd batch size.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        mix: Mixup | None = None,
    ) -> None:
        self._size, self._batch_size, self._seed, self._workers = size, batch_size, seed, workers
        self._device, self._rank, self._world_size = torch.device(device), rank, world_size
        self._mix = mix and PairMixup(mix, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)

    def __len__(self) -> int:
        return self._size // (self._batch_size * self._world_size)

    def _create_loader(self, images: Dataset, generator: torch.Generator, **options: Any) -> DataLoader:
        return DataLoader(
            images,
            self._batch_size,
            drop_last=True,
            num_workers=self._workers,
            worker_init_fn=ignore_sigterm,
            pin_memory=self._device.type == "cuda",
            generator=generator,  # separate, so starting an epoch does not advance the global generator
            **options,
        )

    def _on_device(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        return (tensor.to(self._device, non_blocking=True) for tensor in tensors)


class TrainBatches(BatchSource):
    """Shuffled, augmented batches of a map-style data set of (PIL image, label).

    The batches depend on (seed, epoch) only, not on the number of workers or on `first`. The order is drawn once for
    all ranks, with one seed per image for its transform. So N ranks with batches of b images see the same images as one
    process with batches of N * b images; only the mixing is drawn per rank.

    Args:
        dataset: the images.
        transform: augmentation from a PIL image to a tensor.
        cache: teacher cache. `transform` must then be the deterministic transform of the cache.
        hflip: with `cache`, the probability of a horizontal flip after `transform`.
        options: as `BatchSource`.

    Raises ValueError for `cache` with `mix`, or for `hflip` if the cache has no flips. Iterating raises LoaderError if
    an image cannot be read or a worker died.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        *,
        cache: TeacherCache | None = None,
        hflip: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(len(dataset), **options)
        if cache is not None and self._mix is not None:
            raise ValueError("the teacher cache has no mixed images: omit mixup and cutmix, or the cache")
        if cache is not None and hflip and not cache.flips:
            raise ValueError(
                "the teacher cache has no flipped images: set hflip to 0, or create the cache with --hflip"
            )
        self._cache = cache
        self._items: list[list[int]] = []  # of the next epoch; the loader reads it when an epoch starts
        images = _SeededImages(dataset, transform, cache, hflip)
        persistent = self._workers > 0
        self._loader = self._create_loader(
            images, torch.Generator(), sampler=self._items, persistent_workers=persistent
        )

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        rng = np.random.default_rng((self._seed, epoch))
        items = np.stack([rng.permutation(self._size), rng.integers(2**32, size=self._size)], axis=1)
        items = items[: len(self) * self._world_size * self._batch_size]
        batches = items.reshape(len(self), self._world_size, self._batch_size, 2)
        self._items[:] = batches[first:, self._rank].reshape(-1, 2).tolist()
        with loader_errors():
            for number, tensors in enumerate(self._loader, first):
                images, labels, *rows = self._on_device(tensors)
                if self._mix is not None:
                    yield self._mix(images, labels, epoch=epoch, batch=number)
                else:
                    yield Batch(images, labels, self._cache.outputs(*rows) if rows else None)


class _SeededImages(Dataset):
    """Items are (index, seed of the transform)."""

    def __init__(self, dataset: ImageDataset, transform: Transform, cache: TeacherCache | None, hflip: float) -> None:
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


class PairMixup:
    """Mixup or CutMix of a rank's batches.

    timm mixes image i with image B-1-i. Both get the same id: the smaller of their positions in the epoch, which is
    unique among all pairs and ranks.
    """

    def __init__(self, mix: Mixup, *, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        if batch_size % 2:
            raise ValueError(f"batch_size is {batch_size}; mixup and cutmix mix pairs of images, so it must be even")
        self._mix, self._size, self._seed, self._rank, self._world_size = mix, batch_size, seed, rank, world_size

    def __call__(self, images: Tensor, labels: Tensor, *, epoch: int, batch: int) -> Batch:
        """Mix the batch number `batch` of the epoch; the result depends on both numbers, seed and rank.

        Changes `images` (B, 3, H, W) in place. The labels of the result are (B, classes) float32.
        """
        with seeded(derive_seed((self._seed, epoch, batch, self._rank))):
            images, labels = self._mix(images, labels)
        first = (batch * self._world_size + self._rank) * self._size
        return Batch(images, labels, ids=mirror_ids(first, self._size, images.device))


def mirror_ids(first: int, size: int, device: torch.device) -> Tensor:
    """Ids (size,) of images `first`, `first` + 1, ...: images i and size-1-i, which timm mixes, get the same id."""
    number = torch.arange(first, first + size, device=device)
    return torch.minimum(number, number.flip(0))


def derive_seed(numbers: Sequence[int]) -> int:
    """A seed of 32 bits that depends on all `numbers`."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that transforms use, and restore their states afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
    random.setstate(python)
    np.random.set_state(numpy)
