"""What `fit` asks of a source of batches."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from .distiller import TeacherOutputs


class Batch(NamedTuple):
    """images (B, 3, H, W); labels (B,) int64, -100 where there is none, or probabilities (B, classes); the teacher's
    outputs if cached; ids (B,) int64, equal where two images are no negatives of each other.
    """

    images: Tensor
    labels: Tensor
    teacher: TeacherOutputs | None = None
    ids: Tensor | None = None


class Batches(Protocol):
    """A source of training batches; the rules are at the top of this file."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]: ...
