"""Steps of each op and of the loss with their inputs, for the tests on a GPU.

Every test gets its device from a fixture, and few helpers use CUDA, so most code can be run on a CPU in Triton's
interpreter.
"""

from collections.abc import Callable

import torch
from torch import Tensor, randn

import lfcc_kernels as lk
from lfcc_kernels.filters import Learnable

Step = Callable[[], list[Tensor]]


def step_of(loss: Callable[[], Tensor], learning: list[Tensor]) -> Step:
    """Forward and backward pass; forward only if nothing requires a gradient."""

    def step() -> list[Tensor]:
        result = loss()
        if not learning:
            return [result]
        upstream = torch.linspace(0.5, 1.5, result.numel(), device=result.device, dtype=result.dtype)
        return [result.detach(), *torch.autograd.grad(result, learning, upstream.view_as(result))]

    return step


def lowpass_step(
    device: torch.device, x: Tensor | None = None, filters: bool = False, learns: bool = True
) -> tuple[Step, list[Tensor]]:
    """Low-pass of a map, and its inputs."""
    x = randn(4, 32, 14, 14, device=device) if x is None else x
    matrices = [m.detach() for m in Learnable((1, 2, 4)).to(device)(*x.shape[2:])] if filters else []
    matrices = [m + 0.1 * torch.randn_like(m) for m in matrices]
    inputs = [tensor.detach().requires_grad_(learns) for tensor in (x, *matrices)]

    def loss() -> Tensor:
        rows, cols = inputs[1:] if filters else (None, None)
        return lk.lowpass(inputs[0], (1, 2, 4), row_filters=rows, col_filters=cols)

    return step_of(loss, inputs if learns else []), inputs


def info_nce_step(
    device: torch.device,
    batch: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    direction: str = "student_to_teacher",
    temperature: float | Tensor = 0.1,
    learns: bool = True,
    teacher_learns: bool = False,
) -> tuple[Step, list[Tensor]]:
    """Contrast of slightly similar rows, and its inputs; a tensor as temperature is trainable."""
    common = randn(batch, width, device=device)
    student, teacher = ((common + 2 * torch.randn_like(common)).to(dtype) for _ in range(2))
    inputs = [student.requires_grad_(learns), teacher.requires_grad_(learns and teacher_learns)]
    if isinstance(temperature, Tensor):
        inputs.append(temperature.to(device).requires_grad_(learns))
        temperature = inputs[2]

    def loss() -> Tensor:
        return lk.info_nce(inputs[0], inputs[1], temperature=temperature, direction=direction)

    return step_of(loss, [x for x in inputs if x.requires_grad]), inputs


def lfcc_step(device: torch.device, batch: int, channels: int = 64, size: int = 14) -> tuple[Step, list[Tensor]]:
    """The whole loss of two stages."""
    with device:
        loss = lk.LFCCLoss((channels, channels), (2 * channels, channels))
    student = [randn(batch, channels, side, side, device=device) for side in (size, size // 2)]
    teacher = [randn(batch, c, side, side, device=device) for c, side in ((2 * channels, size), (channels, size // 2))]
    student = [x.requires_grad_() for x in student]
    return step_of(lambda: loss(student, teacher), [*student, *loss.parameters()]), [*student, *teacher]


def warm_up(step: Step) -> None:
    """Load kernels and allocate the buffers of libraries on a side stream, as PyTorch recommends."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, same in zip(results, expected, strict=True):
        torch.testing.assert_close(result, same)


def assert_same_bits(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, same in zip(results, expected, strict=True):
        assert torch.equal(result, same)
