"""`lowpass` and its gradients on the kernels, over the shapes, layouts and dtypes that take different paths in them."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from grids import grid
from oracles import assert_close_to_truth, gradients, in_float64, rounding, torch_lowpass
from torch import Tensor, randn

import lfcc_kernels as lk

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

SHAPES = {
    "first stage at 224 pixels": ((2, 16, 56, 56), (1, 2, 4)),
    "second stage, 33 channels": ((2, 33, 28, 28), (1, 2, 4)),
    "third stage, 14 to 4 overlaps, odd channels": ((3, 17, 14, 14), (1, 2, 4)),
    "last stage, 7 to 2 and to 4 overlap": ((2, 64, 7, 7), (1, 2, 4)),
    "a map of one pixel": ((3, 3, 1, 1), (1,)),
    "tiny, not square": ((2, 16, 5, 3), (1, 2, 3)),
    "prime sides, one image": ((1, 3, 13, 17), (1, 2, 4)),
    "half a square": ((2, 16, 7, 14), (1, 2, 4)),
    "wide map, few channels": ((1, 3, 20, 112), (1, 2, 4)),
    "one row of a map more than a tile": ((1, 2, 3, 515), (1, 2, 3)),
    "one channel, one image, windows of one pixel": ((1, 1, 4, 4), (4,)),
    "one column": ((2, 5, 9, 1), (1,)),
    "one row": ((2, 5, 1, 9), (1,)),
    "one scale, every row a window": ((2, 16, 7, 7), (7,)),
    "the global mean alone": ((2, 17, 14, 14), (1,)),
    "odd scales": ((2, 3, 14, 11), (3, 5)),
    "scales in falling order": ((2, 16, 14, 14), (4, 2, 1)),
    "a scale twice": ((2, 3, 7, 7), (1, 1)),
    "many scales": ((1, 17, 14, 14), (1, 2, 3, 4, 5, 6, 7)),
    "one channel more than the largest block": ((1, 513, 3, 4), (1, 2)),
}

# The average and given filters, each in the two layouts that kernels read in place.
FORMS = {
    f"{filters}-{name}": (filters, layout)
    for filters in ("average", "dense")
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last))
}

LAYOUTS: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "contiguous": lambda randn: randn(2, 17, 14, 14),
    "channels_last": lambda randn: _channels_last(randn(2, 17, 14, 14)),
    "channels_last with one channel": lambda randn: _channels_last(randn(2, 1, 14, 14)),
    "every second channel": lambda randn: randn(2, 34, 14, 14)[:, ::2],
    "a channels_last slice of channels": lambda randn: _channels_last(randn(2, 34, 14, 14))[:, 3:20],
    "every second channel of channels_last": lambda randn: _channels_last(randn(2, 34, 14, 14))[:, ::2],
    "first column cut off": lambda randn: randn(2, 17, 14, 15)[..., 1:],
    "a crop": lambda randn: randn(2, 17, 17, 19)[..., 2:16, 1:15],
    "a channels_last crop": lambda randn: _channels_last(randn(2, 17, 17, 19))[..., 2:16, 1:15],
    "every second pixel": lambda randn: randn(2, 17, 28, 28)[..., ::2, ::2],
    "every second image": lambda randn: randn(4, 17, 14, 14)[::2],
    "height and width exchanged": lambda randn: randn(2, 17, 14, 14).transpose(2, 3),
    "batch innermost": lambda randn: randn(17, 14, 14, 2).permute(3, 0, 1, 2),
    "expanded over the batch": lambda randn: randn(1, 17, 14, 14).expand(2, -1, -1, -1),
    "expanded over channels": lambda randn: randn(2, 1, 14, 14).expand(-1, 17, -1, -1),
    "expanded over pixels": lambda randn: randn(2, 17, 1, 1).expand(-1, -1, 14, 14),
    "expanded over rows": lambda randn: randn(2, 17, 1, 14).expand(-1, -1, 14, -1),
}

TOKENS: dict[str, tuple[Callable[[Callable[..., Tensor]], Tensor], tuple[int, int], int]] = {
    "no prefix, square": (lambda randn: randn(2, 49, 17), (7, 7), 0),
    "class token": (lambda randn: randn(2, 197, 16), (14, 14), 1),
    "class and register tokens": (lambda randn: randn(3, 54, 33), (7, 7), 5),
    "wide grid": (lambda randn: randn(2, 1 + 5 * 9, 16), (5, 9), 1),
    "one row of tokens": (lambda randn: randn(2, 12, 3), (1, 12), 0),
    "one token": (lambda randn: randn(2, 2, 3), (1, 1), 1),
    "transposed (B, C, N)": (lambda randn: randn(2, 17, 50).transpose(1, 2), (7, 7), 1),
    "transposed (N, B, C)": (lambda randn: randn(50, 2, 17).transpose(0, 1), (7, 7), 1),
    "a slice of the channels": (lambda randn: randn(2, 50, 40)[..., 7:24], (7, 7), 1),
    "every second channel": (lambda randn: randn(2, 50, 34)[..., ::2], (7, 7), 1),
    "every second token": (lambda randn: randn(2, 100, 17)[:, ::2], (7, 7), 1),
    "expanded over the batch": (lambda randn: randn(1, 50, 17).expand(2, -1, -1), (7, 7), 1),
}


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def dense_filters(scales: tuple[int, ...], height: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Random matrices: no symmetry, no zero, both signs, in the dtype of sums."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [randn(sum(scales), side, dtype=dtype, requires_grad=True) for side in (height, width)]


def maps_of(x: Tensor, grid: tuple[int, int] | None, prefix_tokens: int) -> Tensor:
    """x as (B, C, H, W)."""
    return x if grid is None else x[:, prefix_tokens:].unflatten(1, grid).permute(0, 3, 1, 2)


def check(
    x: Tensor,
    scales: tuple[int, ...] = (1, 2, 4),
    filters: list[Tensor] | tuple[None, None] = (None, None),
    grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
) -> Tensor:
    """Compares the result and all gradients with the reference; returns the gradient of x."""
    x = x.detach().requires_grad_()
    rows, cols = filters
    inputs = [x, rows, cols]
    exact_inputs = in_float64(*inputs)
    y = lk.lowpass(x, scales, row_filters=rows, col_filters=cols, grid=grid, prefix_tokens=prefix_tokens)
    reference = torch_lowpass(maps_of(x, grid, prefix_tokens), scales, rows, cols)
    truth = torch_lowpass(maps_of(exact_inputs[0], grid, prefix_tokens), scales, *exact_inputs[1:])
    assert_close_to_truth(y, reference, truth, factor=2, floor=2 * rounding(x.dtype, truth))

    upstream = torch.randn_like(y)
    results = gradients(y, inputs, upstream)
    expected = gradients(reference, inputs, upstream), gradients(truth, exact_inputs, upstream.double())
    for result, reference_gradient, exact in zip(results, *expected, strict=True):
        floor = 4 * rounding(result.dtype, exact)
        assert_close_to_truth(result, reference_gradient, exact, factor=3, floor=floor)
    return results[0]


# Paths branch on the shape (units of 8 and of 512 channels in the CPU kernels, tiles of 16 KiB and passes of 8 filters
# in the CUDA kernels, blocks of 64 channels and of 64 cells in the Triton kernels) and on the form. Within a form they
# branch on the bytes of an element, which decide how wide accesses are. So shape x form and dtype x form are covered.
# A path depends on all three only if the width of an access does, and the named cases hit these: rows of a whole number
# of 16 bytes and other rows (CPU), runs of whole maps (Triton, two bytes), copies of odd channels (CUDA).
@grid(
    shape=SHAPES,
    dtype=DTYPES,
    form=FORMS,
    named=[
        ("first stage at 224 pixels", torch.bfloat16, "average-contiguous"),
        ("second stage, 33 channels", torch.float32, "average-contiguous"),
        ("second stage, 33 channels", torch.bfloat16, "average-contiguous"),
        ("third stage, 14 to 4 overlaps, odd channels", torch.bfloat16, "dense-channels_last"),
        ("third stage, 14 to 4 overlaps, odd channels", torch.bfloat16, "average-channels_last"),
        ("last stage, 7 to 2 and to 4 overlap", torch.bfloat16, "average-contiguous"),
        ("last stage, 7 to 2 and to 4 overlap", torch.bfloat16, "dense-contiguous"),
        ("last stage, 7 to 2 and to 4 overlap", torch.float16, "dense-contiguous"),
        ("last stage, 7 to 2 and to 4 overlap", torch.bfloat16, "dense-channels_last"),
    ],
)
def test_shapes(
    kernels: str,
    shape: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
    form: tuple[str, torch.memory_format],
) -> None:
    (size, scales), (filters, layout) = shape, form
    x = randn(size, dtype=dtype).to(memory_format=layout)
    check(x, scales, dense_filters(scales, *size[2:], dtype) if filters == "dense" else (None, None))


# Kernels read maps with a stride of 1 along channels or columns in place, and copies of all others. The dtype and the
# filters matter only afterwards, so each has to meet every layout once.
@grid(
    layout=LAYOUTS,
    dtype=[torch.float32, torch.bfloat16],
    filters=["average", "dense"],
    named=[
        ("a crop", torch.bfloat16, "average"),
        ("a channels_last crop", torch.bfloat16, "dense"),
        ("a channels_last slice of channels", torch.bfloat16, "dense"),
    ],
)
def test_layouts(kernels: str, layout: Callable[..., Tensor], dtype: torch.dtype, filters: str) -> None:
    x = layout(partial(torch.randn, dtype=dtype))
    before = x.clone()
    check(x, filters=dense_filters((1, 2, 4), 14, 14, dtype) if filters == "dense" else (None, None))
    assert torch.equal(x, before)


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    """New tensors are filled with NaN, so that an element of a result that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# Tokens are a map that begins after the prefix and share its code path from there, so two widths of dtypes suffice.
@grid(
    tokens=TOKENS,
    dtype=[torch.float32, torch.bfloat16],
    filters=["average", "dense"],
    named=[("class and register tokens", torch.bfloat16, "average"), ("class token", torch.float32, "dense")],
)
@pytest.mark.usefixtures("unwritten_memory_is_nan")
def test_tokens(
    kernels: str, tokens: tuple[Callable[[], Tensor], tuple[int, int], int], dtype: torch.dtype, filters: str
) -> None:
    make, grid, prefix = tokens
    scales = tuple(s for s in (1, 2, 4) if s <= min(grid))
    x = make(partial(torch.randn, dtype=dtype))
    matrices = dense_filters(scales, *grid, dtype) if filters == "dense" else (None, None)
    grad = check(x, scales, matrices, grid, prefix)
    assert not grad[:, :prefix].any()


def test_square_grid_of_tokens_is_inferred(backend: str) -> None:
    tokens = randn(2, 50, 16)
    assert torch.equal(lk.lowpass(tokens, prefix_tokens=1), lk.lowpass(tokens, prefix_tokens=1, grid=(7, 7)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_has_the_layout_of_the_map(kernels: str, dtype: torch.dtype) -> None:
    for x in (randn(2, 16, 7, 7, dtype=dtype), _channels_last(randn(2, 16, 7, 7, dtype=dtype))):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(lk.lowpass(x).float().square().sum(), x)
        assert grad.stride() == x.stride() and grad.dtype == dtype


FILTER_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed in memory": lambda filters: filters.t().contiguous().t(),
    "a row of zeros": lambda filters: filters * (torch.arange(len(filters)) != 1)[:, None],
    "all zeros": torch.zeros_like,
    "zeros at the ends and between": lambda filters: filters * torch.tensor([0, 1, 0, 0, 1, 1, 0]),
    "expanded": lambda filters: filters[:, :1].expand(-1, 7),
}


@pytest.mark.parametrize("form", FILTER_FORMS)
def test_forms_of_filters(kernels: str, form: str) -> None:
    for x in (randn(2, 17, 7, 7), _channels_last(randn(2, 17, 7, 7))):
        filters = [FILTER_FORMS[form](f.detach()) for f in dense_filters((1, 2, 4), 7, 7, x.dtype)]
        check(x, filters=[f.requires_grad_() for f in filters])


@pytest.mark.parametrize("learns", ["x", "rows", "cols", "x rows", "x cols", "rows cols", "x rows cols"])
def test_gradients_for_every_subset(kernels: str, learns: str) -> None:
    x, filters = randn(2, 17, 14, 14).double(), dense_filters((1, 2, 4), 14, 14, torch.float64)
    every = dict(zip(("x", "rows", "cols"), (x.requires_grad_(), *filters), strict=True))
    kwargs = {"row_filters": filters[0], "col_filters": filters[1]}
    of_all = gradients(lk.lowpass(x, **kwargs).square().sum(), list(every.values()))
    expected = dict(zip(every, of_all, strict=True))
    for name, tensor in every.items():
        tensor.requires_grad_(name in learns.split())
    lk.lowpass(x, **kwargs).square().sum().backward()
    for name, tensor in every.items():
        if name in learns.split():
            torch.testing.assert_close(tensor.grad, expected[name])
        else:
            assert tensor.grad is None


def test_no_gradient_no_graph(kernels: str) -> None:
    x = randn(2, 3, 7, 7, requires_grad=True)
    with torch.no_grad():
        assert not lk.lowpass(x).requires_grad
    assert not lk.lowpass(x.detach()).requires_grad


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_map_passes_unchanged(backend: str, dtype: torch.dtype, channels_last: bool) -> None:
    # Float32 sums these exactly; a sum in float16 overflows, one in bfloat16 stops growing.
    levels = torch.tensor([1.0, -3.0, 1000.0, 60000.0], dtype=dtype)
    x = levels[None, :, None, None].expand(2, -1, 28, 28)
    x = _channels_last(x) if channels_last else x.contiguous()
    expected = levels.expand(2, 21, -1)
    torch.testing.assert_close(lk.lowpass(x), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_a_small_type_passes(backend: str, dtype: torch.dtype, channels_last: bool) -> None:
    """A window of one pixel is its own mean: conversions to the sum's type and back lose nothing."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, -1, 8, 8)
    y = lk.lowpass(_channels_last(x) if channels_last else x, (8,))
    torch.testing.assert_close(y, x.flatten(2).transpose(1, 2), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_types_are_rounded_once_to_nearest(kernels: str, dtype: torch.dtype, channels_last: bool) -> None:
    x = randn(2, 17, 14, 14, dtype=dtype)
    small = (_channels_last(x) if channels_last else x).requires_grad_()
    raised = small.detach().float().requires_grad_()
    y, raised_y = lk.lowpass(small), lk.lowpass(raised)
    assert torch.equal(y, raised_y.to(dtype))
    upstream = torch.randn_like(y)
    (grad,), (raised_grad,) = gradients(y, [small], upstream), gradients(raised_y, [raised], upstream.float())
    if kernels == "triton":  # it multiplies by weights in two pieces, so the last bit may differ
        torch.testing.assert_close(grad, raised_grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)
    else:
        assert torch.equal(grad, raised_grad.to(dtype))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_images_further_apart_than_32_bits_count(kernels: str, channels_last: bool) -> None:
    """The memory between them is not accessed, so it is never committed."""
    images, apart = randn(2, 3, 8, 9).bfloat16(), 2**31 + 16
    memory = torch.empty(apart + 1000, dtype=torch.bfloat16)
    strides = (1, 27, 3) if channels_last else (72, 9, 1)
    x = memory.as_strided(images.shape, (apart, *strides)).copy_(images)
    torch.testing.assert_close(lk.lowpass(x), torch_lowpass(images, (1, 2, 4)))


@pytest.mark.parametrize("filters", ["average", "dense"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_nan_around_a_crop_changes_nothing(kernels: str, channels_last: bool, filters: str) -> None:
    """Vectors may reach past the end of a row into memory that belongs to no pixel of the map."""
    around = torch.full((2, 17, 17, 19), torch.nan)
    crop = (_channels_last(around) if channels_last else around)[..., 2:16, 1:15]
    crop.copy_(randn(2, 17, 14, 14))
    check(crop, filters=dense_filters((1, 2, 4), 14, 14, crop.dtype) if filters == "dense" else (None, None))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_nan_and_inf_come_out_where_they_went_in(backend: str, bad: float, channels_last: bool) -> None:
    x = randn(2, 17, 14, 14)
    x[1, 3, 0, 13] = bad
    y = lk.lowpass(_channels_last(x) if channels_last else x)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[1, [0, 2, 8], 3] = True  # the mean, the upper right of 2 x 2 and of 4 x 4
    torch.testing.assert_close(y[touched], torch.full((3,), bad), equal_nan=True)
    assert y[~touched].isfinite().all()
