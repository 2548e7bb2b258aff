"""Calls of the CUDA kernels that together run every code path, for `test_kernels.py` and `test_sanitizers.py`.

The functions of `op_cases.py`, and a shape for each branch of the tiling: several maps per tile, several tiles per map,
by rows and by columns, several passes over the filters, wide and narrow copies, both widths of fused tiles, several
chunks, and a remainder of every kind.
"""

from collections.abc import Callable
from typing import Any

import torch
from op_cases import FUNCTIONS, functions
from torch import Tensor, randn

import lfcc_kernels as lk
from lfcc_kernels.functional import lowpass_foreach

Case = tuple[Callable[..., Tensor], list[Tensor]]
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def results_of(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of all inputs."""
    result = function(*inputs)
    upstream = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view_as(result)
    return [result, *torch.autograd.grad(result, inputs, upstream)]


def contrast(
    batch: int, keys: int, width: int, dtype: torch.dtype, direction: str, ids: bool = False, frozen: bool = False
) -> Case:
    """The positives are the last keys."""
    sides = [randn(rows, width).to(dtype).requires_grad_() for rows in (batch, keys)]
    inputs = [sides[0], torch.tensor(0.1, requires_grad=True), *([] if frozen else [sides[1]])]
    options: dict[str, Any] = {"direction": direction, "positive_offset": keys - batch}
    if ids:
        options |= {"student_ids": torch.arange(keys - batch, keys) % 5, "teacher_ids": torch.arange(keys) % 5}

    def loss(student: Tensor, temperature: Tensor, *learning: Tensor) -> Tensor:
        teacher = learning[0] if learning else sides[1].detach()
        return lk.info_nce(student, teacher, temperature=temperature, **options)

    return loss, inputs


def pyramids(
    size: tuple[int, ...],
    dtype: torch.dtype,
    layout: torch.memory_format,
    scales: tuple[int, ...] = (1, 2, 4),
    cut: Callable[[Tensor], Tensor] = lambda x: x,
) -> Case:
    x = cut(randn(size).to(dtype).to(memory_format=layout)).detach().requires_grad_()
    of_sums = torch.float64 if dtype == torch.float64 else torch.float32
    filters = [randn(sum(scales), side, dtype=of_sums).requires_grad_() for side in x.shape[2:]]
    return lambda x, rows, cols: lk.lowpass(x, scales, row_filters=rows, col_filters=cols), [x, *filters]


def averages(*arguments: Any, **options: Any) -> Case:
    _, (x, *_) = pyramids(*arguments, **options)
    return lambda x: lk.lowpass(x, options.get("scales", (1, 2, 4))), [x]


def many_maps(filtered: bool) -> Case:
    """More maps than one launch processes; one of them is a slice of a larger map."""
    sizes = [(40, 7, 7), (3, 30, 28), (5, 14, 14), (3, 6, 5)] * 4
    maps = [randn(2, *size).requires_grad_() for size in sizes]
    filters = [randn(7, side).requires_grad_() for size in sizes for side in size[1:]] if filtered else []

    def pyramids_of(*inputs: Tensor) -> Tensor:
        maps, filters = inputs[: len(sizes)], inputs[len(sizes) :]
        pairs = list(zip(filters[::2], filters[1::2], strict=True)) or None
        cut = [x[:, :, 1:, :-1] if n == 1 else x for n, x in enumerate(maps)]
        if pairs:
            pairs[1] = (pairs[1][0][:, 1:], pairs[1][1][:, :-1])
        return torch.cat([y.flatten() for y in lowpass_foreach(cut, (1, 2, 4), filters=pairs)])

    return pyramids_of, [*maps, *filters]


CASES: dict[str, Callable[[], Case]] = {
    **{name: lambda name=name: functions(torch.float32)[name] for name in FUNCTIONS},
    "many maps": lambda: many_maps(filtered=False),
    "many maps, filters": lambda: many_maps(filtered=True),
}
for _dtype in DTYPES:
    for _layout in (CONTIGUOUS, CHANNELS_LAST):
        for _size in ((2, 40, 7, 7), (1, 9, 56, 40)):  # several maps per tile, several tiles per map
            CASES[f"{_size}, {_dtype}, {_layout}"] = lambda s=_size, d=_dtype, m=_layout: pyramids(s, d, m)
    for _width in (20, 100, 300):  # both widths of fused tiles, and chunks
        for _direction in ("student_to_teacher", "symmetric"):
            CASES[f"{_direction}, {_width}, {_dtype}"] = lambda w=_width, t=_dtype, d=_direction: contrast(
                150, 150, w, t, d
            )
for _dtype in (torch.float32, torch.bfloat16):
    CASES |= {
        f"{_dtype}, {name}": case
        for name, case in {
            "wider than a tile": lambda t=_dtype: pyramids((1, 2, 5, 515), t, CONTIGUOUS),
            "four passes": lambda t=_dtype: pyramids((1, 17, 14, 14), t, CONTIGUOUS, scales=(1, 2, 3, 4, 5, 6, 7)),
            "four passes, channels_last": lambda t=_dtype: averages(
                (2, 17, 14, 14), t, CHANNELS_LAST, scales=(1, 2, 3, 4, 5, 6, 7)
            ),
            "a crop": lambda t=_dtype: averages((2, 17, 17, 19), t, CONTIGUOUS, cut=lambda x: x[..., 2:16, 1:15]),
            "a channels_last crop": lambda t=_dtype: pyramids(
                (2, 34, 17, 19), t, CHANNELS_LAST, cut=lambda x: x[:, 3:20, 2:16, 1:15]
            ),
            "a pixel": lambda t=_dtype: averages((3, 3, 1, 1), t, CONTIGUOUS, scales=(1,)),
            "a pair": lambda t=_dtype: contrast(1, 2, 3, t, "symmetric"),
            "a key over a tile": lambda t=_dtype: contrast(65, 129, 33, t, "symmetric", ids=True),
            "a key over a tile, frozen": lambda t=_dtype: contrast(65, 129, 33, t, "student_to_teacher", frozen=True),
            "chunks of few rows": lambda t=_dtype: contrast(40, 300, 130, t, "symmetric", ids=True),
            "more keys than a block keeps": lambda t=_dtype: contrast(3, 8199, 3, t, "student_to_teacher", frozen=True),
        }.items()
    }
