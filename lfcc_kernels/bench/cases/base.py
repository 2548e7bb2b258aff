"""The `Case` dataclass and what the suites share. Each suite lists its cases for a CPU and for a GPU.

A candidate is a function of the case's inputs. Every case has "lfcc" and "eager", which in float64 is the reference;
"lfcc, NAME" is lfcc on another backend than the one that `auto` selects. The floor of a case is the sum over its steps
of max(bytes / copy bandwidth, FLOPs / GEMM rate) for the least work of each step: every input and result
moved once, and every product computed once that an algorithm without a B x B matrix needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lfcc_kernels.bench.machine import Machine
from lfcc_kernels.bench.peers import contrast

Candidate = Callable[..., Tensor]

MODES = ("fwd", "fwd+bwd")
SCALES = (1, 2, 4)
CELLS = sum(s * s for s in SCALES)
TEMPERATURE = 0.1


@dataclass(frozen=True)
class WithConversion:
    """A candidate that needs another dtype or layout than the case's inputs.

    The harness times `call` on converted inputs, and the conversion separately.
    """

    call: Candidate
    convert: Callable[[Tensor], Tensor]  # of each input
    conversion: str  # the target, in words

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.call(*map(self.convert, inputs))


@dataclass(frozen=True)
class Step:
    """The least bytes moved and FLOPs computed by one part of a case."""

    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One measurement.

    `inputs` returns a new random set. In mode "fwd+bwd" the gradients of all inputs and `parameters` that require one
    are computed; in mode "fwd" none are. `calls` > 1 measures call overhead: a timing repeats the call on inputs that
    stay in cache, and uses the host's clock on any device.
    """

    suite: str
    label: str  # distinguishes cases of the same shape, dtype and mode
    shape: tuple[int, ...]
    mode: str
    inputs: Callable[[], tuple[Tensor, ...]]
    candidates: dict[str, Candidate]
    steps: tuple[Step, ...] = ()
    formula: str = ""
    dtype: torch.dtype = torch.float32
    parameters: Callable[[], Sequence[Tensor]] = tuple
    calls: int = 1
    memory: bool = False  # whether to measure peak memory
    quick: bool = False  # whether `lfcc bench --quick` includes it
    heaps: bool = True  # whether a CPU measures it with a kept heap too
    axis: str = ""  # the size that varies along its series, such as "B"
    x: int | None = None  # the value of that size
    op: str = ""  # "lowpass" or "info_nce" if it measures that op alone
    size: int = 0  # of that op's call, as `auto` looks it up: elements of the map, or pairs of rows
    baseline: Candidate | None = None  # a training step without the loss
    tolerance: float | None = None  # allowed deviation from the reference; by default the machine's for the dtype
    close: Callable[[], None] = lambda: None  # called after the case: ends processes, frees models

    @property
    def name(self) -> str:
        shape, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        return f"{self.suite}-{self.label}-{shape}-{dtype}-{self.mode}"

    def run(self, call: Candidate, inputs: Sequence[Tensor], upstream: Tensor | None) -> tuple[Tensor, ...]:
        """One call in the case's mode: the result and, with "fwd+bwd", the gradients."""
        if self.mode == "fwd":
            with torch.no_grad():
                return (call(*inputs),)
        result = call(*inputs)
        learn = [x for x in (*inputs, *self.parameters()) if x.requires_grad]
        return result.detach(), *torch.autograd.grad(result, learn, upstream)


def compiled(machine: Machine, candidates: dict[str, Candidate]) -> dict[str, Candidate]:
    """The candidates under torch.compile; empty unless the benchmark is full, because compiling takes seconds each."""
    return {f"compiled {name}": torch.compile(call) for name, call in candidates.items() if machine.size == "full"}


def upcast_on_cpu(machine: Machine, candidates: dict[str, Candidate], dtype: torch.dtype) -> dict[str, Candidate]:
    """The candidates, which compute products; a CPU converts 16-bit inputs to float32 for them."""
    if machine.gpu or dtype.itemsize != 2:
        return candidates
    return {name: WithConversion(call, contrast.upcast, "float32") for name, call in candidates.items()}


def native_bfloat16(machine: Machine, candidates: dict[str, Candidate], dtype: torch.dtype) -> dict[str, Candidate]:
    """The candidates in bfloat16 on a CPU with instructions for it; without them they are a hundred times slower."""
    if machine.gpu or dtype != torch.bfloat16 or not torch.cpu._is_avx512_bf16_supported():
        return {}
    return {f"{name} in bfloat16": call for name, call in candidates.items()}


def bfloat16_on_gpu(machine: Machine, call: Candidate, dtype: torch.dtype) -> Candidate:
    """A candidate that supports only 16-bit inputs on a GPU."""
    if not machine.gpu or dtype.itemsize == 2:
        return call
    return WithConversion(call, partial(Tensor.to, dtype=torch.bfloat16), "bfloat16")


def features(
    machine: Machine,
    shape: tuple[int, ...],
    learn: bool,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """A random feature map, or tokens."""
    values = torch.randn(shape, device=machine.device)
    return values.to(dtype=dtype, memory_format=memory_format).requires_grad_(learn)


def rows(
    machine: Machine, shape: tuple[int, int], learn: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Rows of a student and of a frozen teacher, similar enough that the softmax is not flat."""
    teacher = torch.randn(shape, device=machine.device)
    student = teacher + 2 * torch.randn(shape, device=machine.device)
    return student.to(dtype).requires_grad_(learn), teacher.to(dtype)
