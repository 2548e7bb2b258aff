"""The eager backend, and plain torch in float64, the reference of the kernels, against the loops of `oracles.py`.

All other tests of values compare kernels with plain torch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracles import gradients, in_float64, loop_info_nce, loop_lowpass, rounding, torch_info_nce, torch_lowpass
from test_info_nce import DIRECTIONS, IDS, pair
from test_info_nce_extremes import LENGTHS
from test_lowpass import SHAPES, TOKENS, dense_filters, maps_of
from torch import Tensor, randn

import lfcc_kernels as lk


def assert_same(result: Tensor, truth: Tensor) -> None:
    """Up to a few roundings of the largest number."""
    assert result.shape == truth.shape
    assert (result.double() - truth).abs().max() <= 64 * rounding(torch.float64, truth)


def compare(inputs: list[Tensor | None], loops: Callable, *functions: Callable[..., Tensor]) -> None:
    """Results and gradients of functions with those of the loops."""
    truth = loops(*(copies := in_float64(*inputs)))
    upstream = torch.randn_like(truth)
    expected = [truth, *gradients(truth, copies, upstream)]
    for function in functions:
        result = function(*(copies := in_float64(*inputs)))
        for output, same in zip([result, *gradients(result, copies, upstream)], expected, strict=True):
            assert_same(output, same)


@pytest.fixture(autouse=True)
def eager_backend() -> Iterator[None]:
    with lk.use_backend("eager"):
        yield


@pytest.mark.parametrize("filters", ["average", "dense"])
@pytest.mark.parametrize(("size", "scales"), SHAPES.values(), ids=SHAPES)
def test_lowpass(size: tuple[int, ...], scales: tuple[int, ...], filters: str) -> None:
    x = randn(size, dtype=torch.float64, requires_grad=True)
    matrices = dense_filters(scales, *size[2:], x.dtype) if filters == "dense" else [None, None]

    def eager(x: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
        return lk.lowpass(x, scales, row_filters=rows, col_filters=cols)

    def written_out(function: Callable) -> Callable[..., Tensor]:
        return lambda x, rows, cols: function(x, scales, rows, cols)

    compare([x, *matrices], written_out(loop_lowpass), written_out(torch_lowpass), eager)


@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens(tokens: str) -> None:
    make, grid, prefix = TOKENS[tokens]

    def eager(x: Tensor) -> Tensor:
        return lk.lowpass(x, (1,), grid=grid, prefix_tokens=prefix)

    compare([make(randn).requires_grad_()], lambda x: loop_lowpass(maps_of(x, grid, prefix), (1,)), eager)


SIZES = {"one pair": (1, 1, 0, 3), "one row, three keys": (1, 3, 2, 32), "a part of the keys": (20, 50, 13, 9)}


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"normalize": False}], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_info_nce(size: str, direction: str, options: dict[str, str | bool]) -> None:
    batch, keys, offset, width = SIZES[size]
    compare_losses(pair(batch, keys, width), direction=direction, positive_offset=offset, **options)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", IDS)
def test_ids(kind: str, direction: str) -> None:
    ids = IDS[kind](50)
    compare_losses(
        pair(20, 50), direction=direction, student_ids=ids[13:33], teacher_ids=ids, positive_offset=13
    )  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ids_that_differ_between_the_sides(direction: str) -> None:
    compare_losses(
        pair(20, 20), direction=direction, student_ids=torch.randint(4, (20,)), teacher_ids=torch.randint(4, (20,))
    )


@pytest.mark.parametrize("learns", ["stT", "sT", "t"])
def test_what_learns(learns: str) -> None:
    compare_losses(pair(5, 7, learns=learns), temperature=torch.tensor(0.5, requires_grad="T" in learns))


def compare_losses(sides: list[Tensor], temperature: Tensor | None = None, **options: Any) -> None:
    temperature = torch.tensor(0.1, requires_grad=True) if temperature is None else temperature

    def loss(function: Callable) -> Callable[..., Tensor]:
        return lambda *sides, **_: function(*sides[:2], temperature=sides[2], **options)

    compare([*sides, temperature], *map(loss, (loop_info_nce, torch_info_nce, lk.info_nce)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """Sums are taken in float32 at least; a pyramid has the map's dtype, a loss that of the sums."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    x, (student, teacher) = randn(2, 3, 14, 11).to(dtype), (randn(9, 16).to(dtype) for _ in range(2))
    y, loss = lk.lowpass(x), lk.info_nce(student, teacher)
    assert (y.dtype, loss.dtype) == (dtype, sums)
    truth = loop_lowpass(x, (1, 2, 4))
    torch.testing.assert_close(y.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(loss.double(), loop_info_nce(student, teacher), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [length for length, (_, dtypes) in LENGTHS.items() if torch.float32 in dtypes])
def test_rows_of_extreme_length(length: str) -> None:
    """Their squares leave the range of float32."""
    sides = [LENGTHS[length][0](torch.float32).requires_grad_() for _ in range(2)]
    loss, truth = lk.info_nce(*sides), loop_info_nce(*(copies := in_float64(*sides)))
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    for side, grad, exact in zip(copies, gradients(loss, sides), gradients(truth, copies), strict=True):
        lengths = side.detach().norm(dim=1, keepdim=True).clamp_min(1e-12)
        torch.testing.assert_close(grad.double() * lengths, exact * lengths, rtol=1e-5, atol=2e-6)
