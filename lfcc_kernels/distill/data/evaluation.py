"""Evaluation on all ranks: the loader of validation images, and top-1 accuracy."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from lfcc_kernels.distill.distributed import gather_objects

from .loader import Transform
from .readers import ImageDataset, LoaderError, Stream, ignore_sigterm, loader_errors, read_image, read_stream

_PADDING = -100  # the label of padding images, which torch and torchmetrics ignore


class EvaluationImages(Dataset):
    """A rank's share of a data set of (PIL image, label) under a deterministic transform.

    All ranks have equally many images: the last image is repeated with the label -100, which `top1` ignores.
    """

    def __init__(self, dataset: ImageDataset, transform: Transform, rank: int = 0, world_size: int = 1) -> None:
        self._dataset, self._transform, self._rank, self._world_size = dataset, transform, rank, world_size

    def __len__(self) -> int:
        return -(-len(self._dataset) // self._world_size)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        index, last = number * self._world_size + self._rank, len(self._dataset) - 1
        image, label = read_image(self._dataset, min(index, last))
        return self._transform(image), label if index <= last else _PADDING


class EvaluationStream(IterableDataset):
    """A rank's share of a Stream, in order and padded as in `EvaluationImages`. Every rank reads all images."""

    def __init__(self, stream: Stream, transform: Transform, rank: int, world_size: int) -> None:
        self._stream, self._transform, self._rank, self._world_size = stream, transform, rank, world_size
        self._images = stream.read()

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        number = -1
        for number, (image, label) in enumerate(read_stream(self._stream.name, self._images)):
            if number % self._world_size == self._rank:
                yield self._transform(image), int(label)
        if number % self._world_size < self._rank:
            yield self._transform(image), _PADDING

    def require(self, counted: int) -> None:
        """Raises LoaderError if `counted` differs from the length of the stream: timm skips damaged images."""
        if counted != len(self._stream):
            raise LoaderError(
                f"{self._stream.name}: {counted} of {len(self._stream)} validation images were read; check timm's "
                "warnings, --input-key, --target-key, and the number in --val-split"
            )


def evaluation_loader(
    dataset: ImageDataset | Stream,
    transform: Transform,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Batches of (images, labels) for `top1`: this rank's share, with equally many batches on all ranks.

    With a Stream, every rank reads and decodes all images.
    """
    options = transform, rank, world_size
    return DataLoader(
        EvaluationStream(dataset, *options) if isinstance(dataset, Stream) else EvaluationImages(dataset, *options),
        batch_size,
        num_workers=workers,
        worker_init_fn=ignore_sigterm,
        generator=torch.Generator(),
    )


@torch.no_grad()
def top1(model: nn.Module, loader: DataLoader, num_classes: int) -> float:
    """Top-1 accuracy over all ranks in per cent. `model` maps images to logits; it is left in evaluation mode.

    Raises LoaderError if an image cannot be read, or if a Stream does not have as many images as it declares.
    """
    device, counted = next(model.parameters()).device, 0
    accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=_PADDING).to(device)
    model.eval()
    with loader_errors():
        for images, labels in loader:
            accuracy.update(model(images.to(device)), labels.to(device))
            counted += int((labels != _PADDING).sum())
    if isinstance(loader.dataset, EvaluationStream):
        loader.dataset.require(sum(gather_objects(counted)))
    return 100 * accuracy.compute().item()
