"""Training batches of a `Stream`: WebDataset shards, Hugging Face and TensorFlow streams."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from .loader import Batch, BatchSource, Transform, derive_seed, seeded
from .readers import LoaderError, Stream, loader_errors, read_stream


class StreamedBatches(BatchSource):
    """Shuffled, augmented batches of a Stream, as `TrainBatches` for a map-style data set.

    timm's readers shuffle the shards and split them over ranks and workers, so the batches depend on (seed, epoch) and
    on the numbers of ranks and workers (0 workers mean 1). Each epoch starts new processes, so it does not depend on
    earlier epochs. All ranks have equally many batches; an image may repeat if shards differ in length. An epoch that
    starts at `first` returns the same batches as a whole one, but must read and decode the ones before.

    `options` are those of `BatchSource`. Raises ValueError if there are fewer WebDataset shards than workers on all
    ranks. Iterating raises LoaderError if the stream cannot be read or ends early. timm's WebDataset reader skips an
    image that cannot be decoded, with a warning in its log.
    """

    def __init__(self, stream: Stream, transform: Transform, **options: Any) -> None:
        super().__init__(len(stream), **options)
        self._workers = max(1, self._workers)
        if stream.shards is not None and stream.shards < self._workers * self._world_size:
            raise ValueError(
                f"{stream.name} has {stream.shards} shards for {self._world_size} ranks with {self._workers} workers "
                "each: lower --workers, or write more and smaller shards"
            )
        self._stream, self._transform = stream, transform
        self._images = stream.read(
            training=True, batch_size=self._batch_size, seed=self._seed, rank=self._rank, world_size=self._world_size
        )

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        self._images.set_epoch(epoch)
        seed = (self._seed, epoch, self._rank)
        generator = torch.Generator().manual_seed(derive_seed(seed))  # seeds the workers and so their shuffling
        loader = self._create_loader(_SeededStream(self, seed, first), generator, collate_fn=_collate)
        number = first - 1
        with loader_errors():
            for number, tensors in enumerate(islice(loader, first, len(self)), first):
                images, labels = self._on_device(tensors)
                yield self._mix(images, labels, epoch=epoch, batch=number) if self._mix else Batch(images, labels)
        if number + 1 < len(self):
            raise LoaderError(
                f"{self._stream.name} ended after {number + 1} of {len(self)} batches because a worker found no more "
                "images: check timm's warnings, --input-key and --target-key"
            )


class _SeededStream(IterableDataset):
    """The augmented samples of a worker, with None for those of the batches before `first`."""

    def __init__(self, source: StreamedBatches, seed: tuple[int, int, int], first: int) -> None:
        self._name, self._images, self._transform = source._stream.name, source._images, source._transform
        self._batch_size, self._seed, self._first = source._batch_size, seed, first

    def __iter__(self) -> Iterator[tuple[Tensor, int] | None]:
        worker = get_worker_info()
        for number, (image, label) in enumerate(read_stream(self._name, self._images)):
            # The loader takes one batch from each worker in turn.
            if number // self._batch_size * worker.num_workers + worker.id < self._first:
                yield None
                continue
            with seeded(derive_seed((*self._seed, worker.id, number))):
                image = self._transform(image)
            yield image, int(label)


def _collate(samples: list[tuple[Tensor, int] | None]) -> list[Tensor] | None:
    return None if samples[0] is None else default_collate(samples)
