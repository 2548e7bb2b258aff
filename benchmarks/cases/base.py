"""What a case is, and what the suites share. Each suite lists its cases for a CPU and for a GPU.

A candidate is a function of the case's inputs. "ours" and "eager" are always among them, and "eager" in float64 is
the reference; "ours, NAME" is ours by another backend than the one that `auto` takes. The floor of a case is the sum
over its steps of max(bytes / copy bandwidth, FLOPs / GEMM rate), with the least a step can do: every input and result
moved once, and every product done once that is needed without a B x B matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import lfcc_kernels as lk
from benchmarks import machine
from lfcc_kernels.ops.dispatch import select

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
    parameters: tuple[Tensor, ...] = ()
    calls: int = 1
    memory: bool = False  # whether the peak memory is measured

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
        learn = [x for x in (*inputs, *self.parameters) if x.requires_grad]
        return result.detach(), *torch.autograd.grad(result, learn, upstream)


def with_other_backends(case: Case) -> Case:
    """The case with ours by every backend with kernels for a GPU, where it is a GPU that is measured."""
    if machine.HERE.device.type != "cuda":
        return case
    chosen = select(machine.HERE.device, case.dtype)
    others = [name for name in ("triton", "cuda") if name != chosen and name in lk.available_backends()]
    ours = case.candidates["ours"]
    return replace(case, candidates=case.candidates | {f"ours, {name}": partial(_by, name, ours) for name in others})


def _by(backend: str, call: Candidate, *inputs: Tensor) -> Tensor:
    with lk.use_backend(backend):
        return call(*inputs)


def compiled(candidates: dict[str, Candidate]) -> dict[str, Candidate]:
    """The candidates through torch.compile; none in a smoke test, which it would make slow."""
    return {} if machine.TINY else {f"compiled {name}": torch.compile(call) for name, call in candidates.items()}


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
