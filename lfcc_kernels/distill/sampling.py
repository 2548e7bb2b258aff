"""What the sources of batches share: seeds, images that can be named, mixing, and the errors of loader processes."""

import random
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from .batches import Batch
from .readers import ReaderImages

Transform = Callable[[Image.Image], Tensor]

UNCOUNTED = -100  # the label of an image that fills up a batch; torch and torchmetrics pass over it
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid|shared memory|unable to \w+ (to )?file </torch_")


class LoaderError(OSError):
    """Data that cannot be read, or a loader process that died. The message is one line."""


@contextmanager
def loader_errors() -> Iterator[None]:
    """Raise what torch raises for a failed loader process as a LoaderError.

    torch reports a dead process from a signal handler, wherever the main thread is: put this around a whole loop.
    """
    try:
        yield
    except LoaderError as error:
        # From another process comes the text of a traceback, which ends with the message.
        message = str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.LoaderError: ")
        raise LoaderError(message) from error
    except RuntimeError as error:
        reason = next((line.strip() for line in str(error).splitlines() if _DEAD_WORKER.search(line)), None)
        if reason is None:
            raise
        raise LoaderError(
            f"a process that loads images died ({reason}): give the run more memory and shared memory (/dev/shm), "
            "or lower --workers"
        ) from error


def outlive_sigterm(worker: int) -> None:
    """For a loader process: a scheduler sends SIGTERM to all processes, and the run wants to save before it ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def read_image(dataset: Dataset, index: int) -> tuple[Image.Image, int]:
    """An RGB image and its label. Raises LoaderError, which names the image, where it cannot be read."""
    try:
        image, label = dataset[index]
        return image.convert("RGB"), label
    except Exception as error:  # PIL raises whatever the format's reader trips over
        raise LoaderError(f"image {image_name(dataset, index)} cannot be read: {one_line(error)}") from error


def image_name(dataset: Dataset, index: int) -> str:
    """The path of an image where it has one, else its number."""
    if isinstance(dataset, ImageFolder):
        return dataset.samples[index][0]
    name = dataset.filename(index) if isinstance(dataset, ReaderImages) else None
    return name or f"number {index}"


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def mirror_ids(first: int, size: int, device: torch.device) -> Tensor:
    """(size,) integers for images number `first` and on: two that timm mixes with each other share one."""
    number = torch.arange(first, first + size, device=device)
    return torch.minimum(number, number.flip(0))


class PairMixup:
    """Mixup or cutmix of a rank's batches. timm mixes image i with image B-1-i, so these two get one id: the place of
    the lower of the two in the order of the epoch, which no other pair has on any rank.
    """

    def __init__(self, mix: Mixup, *, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        if batch_size % 2:
            raise ValueError(f"mixup and cutmix mix pairs of images: the batch size must be even, got {batch_size}")
        self._mix, self._size, self._seed, self._rank, self._world_size = mix, batch_size, seed, rank, world_size

    def __call__(self, images: Tensor, labels: Tensor, *, epoch: int, batch: int) -> Batch:
        """The batch number `batch` of the epoch under a mixing that follows from these numbers, seed and rank.

        `images` (B, 3, H, W) are changed in place, `labels` (B,) become (B, classes) float32.
        """
        with seeded(draw_seed((self._seed, epoch, batch, self._rank))):
            images, labels = self._mix(images, labels)
        first = (batch * self._world_size + self._rank) * self._size
        return Batch(images, labels, ids=mirror_ids(first, self._size, images.device))


def draw_seed(numbers: Sequence[int]) -> int:
    """A seed of 32 bits that follows from `numbers`."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start the generators that transforms draw from at `seed`, and put them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
    random.setstate(python)
    np.random.set_state(numpy)
