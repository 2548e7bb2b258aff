"""The four banks of filters: their matrices, and that `LowPassPyramid` learns through them."""

import math

import pytest
import torch
import torch.nn.functional as F
from grids import grid
from oracles import assert_close_to_truth, gradients, loop_lowpass, rounding, torch_lowpass, window_means
from torch import Tensor, nn, randn

import lfcc_kernels as lk

SCALES = (1, 2, 4)
BANKS = ["average", "learnable", "gaussian", "dct"]


def filters_of(pyramid: lk.LowPassPyramid, height: int, width: int) -> tuple[Tensor, Tensor]:
    rows, cols = pyramid.bank(height, width)
    if rows is None:
        return window_means(pyramid.scales, height), window_means(pyramid.scales, width)
    return rows, cols


def shaken(pyramid: lk.LowPassPyramid) -> lk.LowPassPyramid:
    """With random parameters, as after some training."""
    for parameter in pyramid.parameters():
        nn.init.normal_(parameter, std=0.5)
    return pyramid


# tests/test_lowpass.py covers the kernels with given filters. These tests cover the torch code from the parameters of a
# bank to its matrices, and one pass through each backend.
@grid(
    bank=BANKS,
    dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
    layout={"contiguous": torch.contiguous_format, "channels_last": torch.channels_last},
)
def test_pyramid_and_its_gradients(
    compiled_kernels: str, bank: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    check_pyramid(bank, dtype, layout)


@pytest.mark.parametrize("bank", BANKS)
def test_pyramid_on_every_backend(backend: str, bank: str) -> None:
    check_pyramid(bank, torch.float32, torch.contiguous_format)


def check_pyramid(bank: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    pyramid = shaken(lk.LowPassPyramid(SCALES, bank))
    exact_pyramid = lk.LowPassPyramid(SCALES, bank).double()
    exact_pyramid.load_state_dict(pyramid.state_dict())
    x = randn(2, 17, 14, 9).to(dtype).to(memory_format=layout).requires_grad_()
    exact_x = x.detach().double().requires_grad_()

    def as_filters(of: lk.LowPassPyramid, dtype: torch.dtype) -> list[Tensor]:
        return [filters.to(dtype) for filters in filters_of(of, 14, 9)]

    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    y = pyramid(x)
    reference = torch_lowpass(x, SCALES, *as_filters(pyramid, accumulator))
    truth = loop_lowpass(exact_x, SCALES, *as_filters(exact_pyramid, torch.float64))
    # The matrices themselves are float32 if the parameters are.
    floor = 2 * rounding(dtype, truth) + 8 * rounding(torch.float32, truth)
    assert_close_to_truth(y, reference, truth, factor=2, floor=floor)

    upstream = torch.randn_like(y)
    inputs, exact_inputs = [x, *pyramid.parameters()], [exact_x, *exact_pyramid.parameters()]
    expected = gradients(reference, inputs, upstream), gradients(truth, exact_inputs, upstream.double())
    for result, torch_gradient, exact in zip(gradients(y, inputs, upstream), *expected, strict=True):
        floor = 4 * rounding(result.dtype, exact) + 8 * rounding(torch.float32, exact)
        assert_close_to_truth(result, torch_gradient, exact, factor=3, floor=floor)


@pytest.mark.parametrize("bank", BANKS)
def test_pyramid_of_tokens_is_that_of_the_map(compiled_kernels: str, bank: str) -> None:
    pyramid = shaken(lk.LowPassPyramid(SCALES, bank))
    x = randn(2, 17, 5, 9)
    tokens = torch.cat([randn(2, 2, 17), x.flatten(2).transpose(1, 2)], 1)
    torch.testing.assert_close(pyramid(tokens, grid=(5, 9), prefix_tokens=2), pyramid(x))


@pytest.mark.parametrize("bank", BANKS)
def test_one_pyramid_for_every_resolution(compiled_kernels: str, bank: str) -> None:
    pyramid = shaken(lk.LowPassPyramid(SCALES, bank))
    names = [name for name, _ in pyramid.named_parameters()]
    for size in ((7, 7), (14, 14), (5, 9), (4, 4), (60, 33)):
        filters = [matrix.float() for matrix in filters_of(pyramid, *size)]
        x = randn(1, 3, *size)
        truth = loop_lowpass(x, SCALES, *filters)
        torch.testing.assert_close(pyramid(x).double(), truth, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in pyramid.named_parameters()] == names


@pytest.mark.parametrize("size", [(7, 7), (14, 10), (9, 4)])
def test_learnable_starts_as_the_average(backend: str, size: tuple[int, int]) -> None:
    x = randn(2, 5, *size)
    torch.testing.assert_close(lk.LowPassPyramid(SCALES, "learnable")(x), lk.LowPassPyramid(SCALES)(x))


@pytest.mark.parametrize("scales", [(1, 2, 4), (3,), (4, 2, 1), (1, 1)])
def test_learnable_is_the_softmax_of_resampled_logits(scales: tuple[int, ...]) -> None:
    bank = shaken(lk.LowPassPyramid(scales, "learnable")).bank
    for logits, filters, size in zip((bank.row_logits, bank.col_logits), bank(7, 30), (7, 30), strict=True):
        assert logits.shape == (sum(scales), 8)
        expected = torch.zeros(sum(scales), size)
        for row, (scale, i) in enumerate((s, i) for s in scales for i in range(s)):
            start, stop = math.floor(i * size / scale), math.ceil((i + 1) * size / scale)
            at_cells = F.interpolate(logits[row][None, None], stop - start, mode="linear").flatten()
            expected[row, start:stop] = at_cells.softmax(0)
        torch.testing.assert_close(filters, expected)


@pytest.mark.parametrize("bank", ["average", "learnable", "gaussian"])
@pytest.mark.parametrize("size", [(7, 7), (14, 9), (4, 31)])
def test_unit_gain_at_zero_frequency(backend: str, bank: str, size: tuple[int, int]) -> None:
    pyramid = shaken(lk.LowPassPyramid(SCALES, bank))
    x = torch.full((2, 3, *size), -2.5)
    torch.testing.assert_close(pyramid(x), torch.full((2, 21, 3), -2.5))


def test_gaussian_is_the_formula() -> None:
    bank = lk.LowPassPyramid((1, 3), "gaussian").bank
    with torch.no_grad():
        bank.log_width.copy_(torch.tensor([0.3, -0.7]))
    rows, cols = bank(6, 10)
    for filters, size in ((rows, 6), (cols, 10)):
        for row, (scale, i, log_width) in enumerate([(1, 0, 0.3), (3, 0, -0.7), (3, 1, -0.7), (3, 2, -0.7)]):
            centre, sigma = (i + 0.5) * size / scale, math.exp(log_width) * size / scale
            weights = [math.exp(-((h + 0.5 - centre) ** 2) / (2 * sigma**2)) for h in range(size)]
            expected = torch.tensor(weights) / sum(weights)
            torch.testing.assert_close(filters[row], expected)


@pytest.mark.parametrize("size", [(4, 4), (7, 14), (13, 31)])
def test_dct_is_scipys(backend: str, size: tuple[int, int]) -> None:
    x = randn(2, 3, *size, dtype=torch.float64)
    dct = pytest.importorskip("scipy.fft").dct
    transformed = torch.tensor(dct(dct(x.cpu().numpy(), axis=2, norm="ortho"), axis=3, norm="ortho"))
    expected = torch.cat([transformed[:, :, :s, :s].flatten(2).transpose(1, 2) for s in SCALES], 1)
    torch.testing.assert_close(lk.LowPassPyramid(SCALES, "dct")(x), expected)


@pytest.mark.parametrize("bank", BANKS)
def test_autocast_does_not_change_the_filters(compiled_kernels: str, bank: str) -> None:
    pyramid, x = shaken(lk.LowPassPyramid(SCALES, bank)), randn(2, 3, 14, 14)
    with torch.autocast("cpu", torch.bfloat16):
        y = pyramid(x)
    torch.testing.assert_close(y, pyramid(x))
