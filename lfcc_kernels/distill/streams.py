"""Batches from data sets that are read from beginning to end: WebDataset shards, Hugging Face and TensorFlow streams.

timm's readers shuffle and divide the shards over ranks and workers. Here each epoch has processes of its own, so that
what they draw follows from (seed, epoch, rank) and not from the epochs before.
"""

from collections.abc import Iterator
from itertools import islice

import torch
from PIL import Image
from timm.data import IterableImageDataset, Mixup
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from .batches import Batch
from .readers import Stream
from .sampling import (
    UNCOUNTED,
    LoaderError,
    PairMixup,
    Transform,
    draw_seed,
    loader_errors,
    one_line,
    outlive_sigterm,
    seeded,
)


class StreamedBatches:
    """Shuffled, augmented batches of a Stream, as `TrainBatches` gives them for a map-style data set.

    Each rank and worker has shards of its own, so order and images follow from (seed, epoch) and the numbers of ranks
    and workers; 0 workers are 1. Every rank has the batches that fit into the number of images; an image may come
    again where shards differ in length. An epoch that is taken up at `first` gives the batches of an unbroken one, but
    reads what comes before, which costs the time of reading and decoding.

    Raises ValueError for an odd batch size with `mix`, and where there are not as many WebDataset shards as workers
    on all ranks. Iterating raises LoaderError where the stream cannot be read or ends early. An image that cannot be
    decoded is left out by timm's reader of WebDataset, with a warning in its log.
    """

    def __init__(
        self,
        stream: Stream,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        mix: Mixup | None = None,
    ) -> None:
        workers = max(1, workers)
        if stream.shards is not None and stream.shards < workers * world_size:
            raise ValueError(
                f"{stream.name} has {stream.shards} shards for {world_size} ranks with {workers} workers each: "
                "lower --workers, or write more and smaller shards"
            )
        self._stream, self._transform = stream, transform
        self._mix = mix and PairMixup(mix, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        self._batch_size, self._seed, self._workers = batch_size, seed, workers
        self._device, self._rank, self._world_size = torch.device(device), rank, world_size
        self._images = stream.read(training=True, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)

    def __len__(self) -> int:
        return len(self._stream) // (self._batch_size * self._world_size)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        self._images.set_epoch(epoch)
        seed = (self._seed, epoch, self._rank)
        loader = DataLoader(
            _SeededStream(self._stream.name, self._images, self._transform, self._batch_size, seed, first),
            self._batch_size,
            drop_last=True,
            num_workers=self._workers,
            collate_fn=_collate,
            worker_init_fn=outlive_sigterm,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator().manual_seed(draw_seed(seed)),  # seeds the workers, and by that their shuffling
        )
        number = first - 1
        with loader_errors():
            for number, (images, labels) in enumerate(islice(loader, first, len(self)), first):
                images, labels = (tensor.to(self._device, non_blocking=True) for tensor in (images, labels))
                yield self._mix(images, labels, epoch=epoch, batch=number) if self._mix else Batch(images, labels)
        if number + 1 < len(self):
            raise LoaderError(
                f"{self._stream.name} ended after {number + 1} of {len(self)} batches: a worker found no image; "
                "look at the warnings of timm, and at --input-key and --target-key"
            )


class EvaluationStream(IterableDataset):
    """A rank's share of a Stream, in order: every rank reads all images, and each keeps one of `world_size`.

    Every rank has the same number: the last image fills up, with the label -100, which `top1` does not count.
    """

    def __init__(self, stream: Stream, transform: Transform, rank: int, world_size: int) -> None:
        self._stream, self._transform, self._rank, self._world_size = stream, transform, rank, world_size
        self._images = stream.read()

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        number = -1
        for number, (image, label) in enumerate(_samples(self._stream.name, self._images)):
            if number % self._world_size == self._rank:
                yield self._transform(image), int(label)
        if number % self._world_size < self._rank:
            yield self._transform(image), UNCOUNTED

    def require(self, counted: int) -> None:
        """Raises LoaderError where `counted` images were read in place of all: timm passes over damaged ones."""
        if counted != len(self._stream):
            raise LoaderError(
                f"{self._stream.name}: {counted} of {len(self._stream)} validation images were read; look at the "
                "warnings of timm, at --input-key and --target-key, and at the number in --val-split"
            )


class _SeededStream(IterableDataset):
    """Augmented samples of a worker, with None for those of the batches before number `first`."""

    def __init__(
        self,
        name: str,
        images: IterableImageDataset,
        transform: Transform,
        batch_size: int,
        seed: tuple[int, int, int],
        first: int,
    ) -> None:
        self._name, self._images, self._transform = name, images, transform
        self._batch_size, self._seed, self._first = batch_size, seed, first

    def __iter__(self) -> Iterator[tuple[Tensor, int] | None]:
        worker = get_worker_info()
        for number, (image, label) in enumerate(_samples(self._name, self._images)):
            # The loader takes a batch from each worker in turn.
            if number // self._batch_size * worker.num_workers + worker.id < self._first:
                yield None
                continue
            with seeded(draw_seed((*self._seed, worker.id, number))):
                image = self._transform(image)
            yield image, int(label)


def _samples(name: str, images: IterableImageDataset) -> Iterator[tuple[Image.Image, int]]:
    try:
        yield from images
    except Exception as error:  # of timm, datasets, tensorflow or the network
        raise LoaderError(f"{name} cannot be read: {one_line(error)}") from error


def _collate(samples: list[tuple[Tensor, int] | None]) -> list[Tensor] | None:
    return None if samples[0] is None else default_collate(samples)
