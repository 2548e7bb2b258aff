"""What a case is, and what the suites share.

A candidate is a function of the case's inputs. "ours" and "eager" are always among them, and "eager" in
float64 is the reference. The floor of a case is the sum over its steps of
max(bytes / copy bandwidth, FLOPs / GEMM rate), with the least a step can do: every input and result moved
once, and every product done once that is needed without a B x B matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.machine import TINY

Candidate = Callable[..., Tensor]

MODES = ("fwd", "fwd+bwd")
SCALES = (1, 2, 4)
CELLS = sum(s * s for s in SCALES)
TEMPERATURE = 0.1


@dataclass(frozen=True)
class Step:
    """The least bytes moved and FLOPs done by one part of a case."""

    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One measurement.

    `inputs` makes a fresh random set. In mode "fwd+bwd" all that requires a gradient in it, and `parameters`,
    is differentiated; in mode "fwd" nothing is. More than one call a timing also keeps the inputs in cache.
    """

    suite: str
    label: str  # what sets the case apart beside shape, dtype and mode
    shape: tuple[int, ...]
    mode: str
    inputs: Callable[[], tuple[Tensor, ...]]
    candidates: dict[str, Candidate]
    steps: tuple[Step, ...] = ()
    formula: str = ""
    dtype: torch.dtype = torch.float32
    parameters: tuple[Tensor, ...] = ()
    calls: int = 1
    memory: bool = False  # whether the peak memory is measured

    @property
    def name(self) -> str:
        shape, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        return f"{self.suite}-{self.label}-{shape}-{dtype}-{self.mode}"


def compiled(candidates: dict[str, Candidate]) -> dict[str, Candidate]:
    """The candidates through torch.compile; none in a smoke test, which it would make slow."""
    return {} if TINY else {f"compiled {name}": torch.compile(call) for name, call in candidates.items()}


def features(
    shape: tuple[int, ...],
    learn: bool,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """A random feature map or tokens."""
    return torch.randn(shape).to(dtype=dtype, memory_format=memory_format).requires_grad_(learn)


def rows(shape: tuple[int, int], learn: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows of a student and of a frozen teacher, alike enough that the softmax is not flat."""
    teacher = torch.randn(shape)
    student = teacher + 2 * torch.randn(shape)
    return student.to(dtype).requires_grad_(learn), teacher.to(dtype)
