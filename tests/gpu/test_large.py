"""Values and gradients at sizes with other code paths, which are too large for the interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from op_cases import DIRECTIONS
from oracles import accumulator, assert_close_to_truth, gradients, in_float64, rounding, torch_info_nce, torch_lowpass
from steps import assert_same_bits, info_nce_step, lfcc_step, lowpass_step, step_of
from torch import Tensor, randn

import lfcc_kernels as lk
from lfcc_kernels.ops.dispatch import select

pytestmark = pytest.mark.gpu


def check_contrast(device: torch.device, batch: int, width: int, dtype: torch.dtype, direction: str) -> None:
    """Loss and gradients against float64, within a few times torch's error in this dtype."""
    total = accumulator(dtype)
    step, inputs = info_nce_step(
        device, batch, width, dtype, direction, torch.tensor(0.1, dtype=total), teacher_learns=True
    )
    exact = in_float64(*inputs)
    with device:  # the references create indices
        reference, truth = (
            torch_info_nce(*sides[:2], temperature=sides[2], direction=direction) for sides in (inputs, exact)
        )
    loss, *results = step()
    logit = 10.0
    precision = rounding(total, logit)
    upstream = 0.5  # that of `step_of` for a scalar
    assert_close_to_truth(loss, reference.detach(), truth.detach(), factor=2, floor=4 * precision)
    expected = gradients(upstream * reference, inputs), gradients(upstream * truth, exact)
    for result, same, exact_gradient in zip(results, *expected, strict=True):
        # The rounding of a logit changes the weights of its row, and so the gradient, by the same fraction.
        largest = exact_gradient.abs().max().item() if result.dim() else logit / 0.1
        floor = rounding(result.dtype, exact_gradient) + precision * largest
        assert_close_to_truth(result, same, exact_gradient, factor=3, floor=floor)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "width"), [(2048, 128), (2048, 512), (4096, 64), (4096, 128), (4111, 125)], ids=str)
def test_gradients(device: torch.device, batch: int, width: int, dtype: torch.dtype, direction: str) -> None:
    check_contrast(device, batch, width, dtype, direction)


def check_lowpass(device: torch.device, x: Tensor, filters: bool) -> None:
    step, inputs = lowpass_step(device, x, filters)
    exact = in_float64(*inputs)
    with device:
        reference, truth = (torch_lowpass(given[0], (1, 2, 4), *given[1:]) for given in (inputs, exact))
    results = step()
    upstream = torch.linspace(0.5, 1.5, reference.numel(), device=device, dtype=reference.dtype).view_as(reference)
    expected = gradients(reference, inputs, upstream), gradients(truth, exact, upstream.double())
    pairs = zip(results, (reference.detach(), *expected[0]), (truth.detach(), *expected[1]), strict=True)
    for result, same, exact_result in pairs:
        assert_close_to_truth(result, same, exact_result, factor=3, floor=4 * rounding(result.dtype, exact_result))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("filters", [False, True], ids=["average", "filters"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(32, 256, 56, 56), (128, 512, 7, 7), (16, 100, 28, 20)], ids=str)
def test_lowpass_and_its_gradients(
    device: torch.device, shape: tuple[int, ...], layout: torch.memory_format, filters: bool, dtype: torch.dtype
) -> None:
    check_lowpass(device, randn(shape, device=device).to(dtype).to(memory_format=layout), filters)


def test_invalid_temperature_on_the_gpu_gives_nan(device: torch.device) -> None:
    """The host does not read it, because that would synchronise."""
    for width in (64, 512):
        for bad in (0.0, -1.0, torch.inf, torch.nan):
            step, _ = info_nce_step(device, 4096, width, temperature=torch.tensor(bad))
            assert all(result.isnan().all() for result in step())


BITS = {
    "lowpass": lambda device: lowpass_step(device, randn(8, 64, 56, 56, device=device), filters=True),
    "lowpass, channels_last": lambda device: lowpass_step(
        device, randn(8, 64, 56, 56, device=device).to(memory_format=torch.channels_last), filters=True
    ),
    "lowpass, average, bfloat16": lambda device: lowpass_step(
        device, randn(8, 64, 56, 56, device=device, dtype=torch.bfloat16)
    ),
    "loss": lambda device: lfcc_step(device, 128),
    "loss, sequential pairs": lambda device: lfcc_step(device, 2048),
}
for _dtype in (torch.float32, torch.bfloat16, torch.float16):
    for _width in (64, 512):
        for _direction in DIRECTIONS:
            BITS[f"{_direction}, {_width}, {_dtype}"] = lambda device, w=_width, t=_dtype, d=_direction: info_nce_step(
                device, 4096, w, t, d, torch.tensor(0.1), teacher_learns=True
            )


@pytest.mark.parametrize("case", BITS)
def test_same_bits_twice(device: torch.device, case: str) -> None:
    step, _ = BITS[case](device)
    first = [x.clone() for x in step()]
    for _ in range(3):
        # Overwrites free memory, so that values read before they are written would differ.
        torch.full_like(first[1], torch.nan)
        assert_same_bits(step(), first)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compiled_loss(device: torch.device, direction: str) -> None:
    torch._dynamo.reset()
    with device:
        loss = lk.LFCCLoss((8, 16), (12, 20), direction=direction, learnable_temperature=True)
    student = [randn(32, c, side, side, device=device, requires_grad=True) for c, side in ((8, 14), (16, 7))]
    teacher = [randn(32, c, side, side, device=device) for c, side in ((12, 14), (20, 7))]
    learning = [*student, *loss.parameters()]
    expected = step_of(lambda: loss(student, teacher), learning)()
    compiled = torch.compile(loss, fullgraph=True)
    for result, same in zip(step_of(lambda: compiled(student, teacher), learning)(), expected, strict=True):
        torch.testing.assert_close(result, same, rtol=1e-4, atol=1e-5)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("batch", "width"), [(4096, 64), (1024, 512)], ids=["fused", "chunks"])
def test_tf32_is_used_only_if_allowed(device: torch.device, batch: int, width: int) -> None:
    """It has 11 of 24 bits, so errors are larger."""
    if width == 64 and select("info_nce", device, torch.float32, batch * batch) == "cuda":
        pytest.skip("its fused tiles never use it")
    step, inputs = info_nce_step(device, batch, width)
    exact = in_float64(*inputs)
    with device:
        truth = torch_info_nce(*exact)
        truth_grad = gradients(0.5 * truth, exact)[0]
    errors = {}
    for allowed in (False, True):
        with tf32(allowed):
            errors[allowed] = (step()[1].double() - truth_grad).abs().max().item() / truth_grad.abs().max().item()
    assert errors[False] < 1e-5
    assert 10 * errors[False] < errors[True] < 1e-2


def test_lowpass_never_uses_tf32(device: torch.device) -> None:
    """Neither does torch's pooling; the kernel is bound by reading the map, so TF32 would not be faster."""
    x = randn(4, 64, 28, 28, device=device)
    step, _ = lowpass_step(device, x, filters=True)
    with tf32(False):
        exact = step()
    with tf32(True):
        assert_same_bits(step(), exact)
