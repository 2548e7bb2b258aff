"""What a case is, and what the suites share. Each suite lists its cases for a CPU and for a GPU.

A candidate is a function of the case's inputs. "ours" and "eager" are always among them, and "eager" in float64 is
the reference; "ours, NAME" is ours by another backend than the one that `auto` takes. The floor of a case is the sum
over its steps of max(bytes / copy bandwidth, FLOPs / GEMM rate), with the least a step can do: every input and result
moved once, and every product done once that is needed without a B x B matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lfcc_kernels.bench import machine

Candidate = Callable[..., Tensor]

MODES = ("fwd", "fwd+bwd")
SCALES = (1, 2, 4)
CELLS = sum(s * s for s in SCALES)
TEMPERATURE = 0.1


@dataclass(frozen=True)
class Converting:
    """A candidate that asks for another dtype or layout than the case's inputs have.

    The harness times `call` on inputs that were converted before, and the conversion by itself.
    """

    call: Candidate
    convert: Callable[[Tensor], Tensor]  # of each input
    conversion: str  # to what, in words

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.call(*map(self.convert, inputs))


@dataclass(frozen=True)
class Step:
    """The least bytes moved and FLOPs done by one part of a case."""

    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One measurement.

    `inputs` makes a fresh random set. In mode "fwd+bwd" all that requires a gradient in it, and `parameters`,
    is differentiated; in mode "fwd" nothing is. More than one call a timing is for what a call costs its caller:
    the inputs stay in cache, and the clock is the caller's on any device.
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
    parameters: Callable[[], Sequence[Tensor]] = tuple
    calls: int = 1
    memory: bool = False  # whether the peak memory is measured
    quick: bool = False  # whether `lfcc bench --quick` has it
    heaps: bool = True  # whether it is measured on a CPU with a kept heap too
    axis: str = ""  # what grows along the series it belongs to, as "B"
    x: int | None = None  # its value in this case
    op: str = ""  # the op that is measured alone, "lowpass" or "info_nce"
    size: int = 0  # of that op's call, as `auto` goes by: elements of the map, or pairs of rows
    baseline: Candidate | None = None  # a training step with the loss left out
    tolerance: float | None = None  # deviation from the reference that is rounding; else the machine's for the dtype
    close: Callable[[], None] = lambda: None  # called after the case: ends processes, lets go of models

    @property
    def name(self) -> str:
        shape, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        return f"{self.suite}-{self.label}-{shape}-{dtype}-{self.mode}"

    def run(self, call: Candidate, inputs: Sequence[Tensor], upstream: Tensor | None) -> tuple[Tensor, ...]:
        """One call in the case's mode: the result, and with "fwd+bwd" the gradients of all that wants one."""
        if self.mode == "fwd":
            with torch.no_grad():
                return (call(*inputs),)
        result = call(*inputs)
        learn = [x for x in (*inputs, *self.parameters()) if x.requires_grad]
        return result.detach(), *torch.autograd.grad(result, learn, upstream)


def compiled(candidates: dict[str, Candidate]) -> dict[str, Candidate]:
    """The candidates through torch.compile; none but in a full benchmark, since that takes seconds each."""
    return {f"compiled {name}": torch.compile(call) for name, call in candidates.items() if machine.SIZE == "full"}


def features(
    shape: tuple[int, ...],
    learn: bool,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """A random feature map or tokens."""
    values = torch.randn(shape, device=machine.HERE.device)
    return values.to(dtype=dtype, memory_format=memory_format).requires_grad_(learn)


def rows(shape: tuple[int, int], learn: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows of a student and of a frozen teacher, alike enough that the softmax is not flat."""
    teacher = torch.randn(shape, device=machine.HERE.device)
    student = teacher + 2 * torch.randn(shape, device=machine.HERE.device)
    return student.to(dtype).requires_grad_(learn), teacher.to(dtype)
