"""Validation of arguments, used by `functional` and by the loss modules.

An error names the function or module and the argument, and states what was received, what was expected and what to do.
Names of arguments are passed in, so that a module reports its own: "LFCCLoss: student_features[1] has shape ...".
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lfcc_kernels.backends.dtypes import SUPPORTED, accumulator
from lfcc_kernels.ops.info_nce import Contrast

DIRECTIONS = ("student_to_teacher", "teacher_to_student", "symmetric")
REDUCTIONS = ("mean", "none")
_DTYPES = "float32, float64, bfloat16 or float16"
_CPU = torch.device("cpu")


class FeatureMap(NamedTuple):
    """A validated map (B, C, H, W), or tokens (B, N, C) of one."""

    x: Tensor
    height: int
    width: int
    grid: list[int]  # as `lfcc::lowpass` expects it: [H, W] of tokens, empty for a map
    prefix_tokens: int
    name: str  # for errors: "function: argument"


def check_map(
    name: str, x: Tensor, grid: tuple[int, int] | None, prefix_tokens: int, *, options: str = ""
) -> FeatureMap:
    """Validate a feature map or tokens. `name` is "function: argument"; `options` prefixes grid and prefix_tokens."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a tensor (B, C, H, W) or (B, N, C)")
    if x.dtype not in SUPPORTED:
        raise TypeError(f"{name} has dtype {x.dtype}; expected {_DTYPES}, convert it with .float()")
    shape = x.shape
    if len(shape) not in (3, 4):
        raise ValueError(f"{name} has shape {tuple(shape)}; expected a map (B, C, H, W) or tokens (B, N, C)")
    if x.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(shape)}, which is empty; expected every size to be at least 1")
    if len(shape) == 4:
        if grid is not None or prefix_tokens != 0:
            raise ValueError(
                f"{name} is a map of shape {tuple(shape)}, but {options}grid and {options}prefix_tokens describe "
                "tokens (B, N, C); pass them with tokens only"
            )
        return FeatureMap(x, shape[2], shape[3], [], 0, name)
    if prefix_tokens < 0:
        raise ValueError(f"{_function(name)}: {options}prefix_tokens is {prefix_tokens}; expected 0 or more")
    height, width = _token_grid(name, shape[1], grid, prefix_tokens, options)
    return FeatureMap(x, height, width, [height, width], prefix_tokens, name)


def _token_grid(
    name: str, tokens: int, grid: tuple[int, int] | None, prefix_tokens: int, options: str
) -> tuple[int, int]:
    if grid is None:
        side = math.isqrt(max(tokens - prefix_tokens, 0))
        if side * side != tokens - prefix_tokens or side == 0:
            raise ValueError(
                f"{name} has {tokens} tokens, which with {options}prefix_tokens={prefix_tokens} do not form a square "
                f"grid; pass {options}grid=(H, W), or {options}prefix_tokens= for class and register tokens"
            )
        return side, side
    try:
        height, width = grid
    except (TypeError, ValueError):
        raise TypeError(f"{_function(name)}: {options}grid is {grid!r}; expected two ints (H, W)") from None
    if height < 1 or width < 1 or height * width != tokens - prefix_tokens:
        raise ValueError(
            f"{name} has {tokens} tokens, but {options}grid=({height}, {width}) with "
            f"{options}prefix_tokens={prefix_tokens} needs {prefix_tokens + height * width}; pass the grid of the "
            "tokens after the prefix"
        )
    return height, width


def check_scales(function: str, scales: Sequence[int]) -> tuple[int, ...]:
    """The scales as a tuple of positive ints."""
    expected = "expected one or more positive ints, e.g. (1, 2, 4)"
    try:
        checked = tuple([int(s) for s in scales])
    except (TypeError, ValueError):
        raise TypeError(f"{function}: scales is {scales!r}, not a sequence of positive ints; {expected}") from None
    if not checked or min(checked) < 1 or checked != tuple(scales):
        raise ValueError(f"{function}: scales is {scales!r}; {expected}")
    return checked


def check_fit(feature_map: FeatureMap, scales: tuple[int, ...]) -> None:
    """Each scale needs at least one row and column per cell."""
    smaller = min(feature_map.height, feature_map.width)
    if max(scales) > smaller:
        raise ValueError(
            f"{feature_map.name} is {feature_map.height} x {feature_map.width} (H x W), smaller than scale "
            f"{max(scales)}; use scales up to {smaller}, or a larger map"
        )


def check_filters(
    feature_map: FeatureMap, scales: tuple[int, ...], row_filters: Tensor | None, col_filters: Tensor | None
) -> None:
    """Both filters or neither, each (sum of scales, side of the map) on the map's device."""
    if row_filters is None and col_filters is None:
        return
    if row_filters is None or col_filters is None:
        given, absent = ("col", "row") if row_filters is None else ("row", "col")
        raise ValueError(
            f"{_function(feature_map.name)}: got {given}_filters without {absent}_filters; pass both, or neither for "
            "the average"
        )
    count = sum(scales)
    _check_filter("row_filters", row_filters, (count, feature_map.height), feature_map)
    _check_filter("col_filters", col_filters, (count, feature_map.width), feature_map)


def _check_filter(argument: str, filters: Tensor, shape: tuple[int, int], feature_map: FeatureMap) -> None:
    x = feature_map.x
    if not isinstance(filters, Tensor):
        problem = f"is a {type(filters).__name__}; expected a tensor {shape}"
        raise TypeError(f"{_function(feature_map.name)}: {argument} {problem}")
    if filters.dtype != accumulator(x.dtype):
        problem = f"has dtype {filters.dtype}; expected {accumulator(x.dtype)} for a map of {x.dtype}"
        raise TypeError(f"{_function(feature_map.name)}: {argument} {problem}")
    if filters.shape != shape:
        problem = f"has shape {tuple(filters.shape)}; expected {shape}, the sum of scales by the side of the map"
        raise ValueError(f"{_function(feature_map.name)}: {argument} {problem}")
    if filters.device != x.device:
        problem = f"is on {filters.device} but the map is on {x.device}; move both to one device"
        raise ValueError(f"{_function(feature_map.name)}: {argument} {problem}")


def check_contrast(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    direction: str,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    positive_offset: int,
    normalize: bool,
    mean: bool,
    *,
    function: str = "info_nce",
    index: str = "",
) -> Contrast:
    """Validate the arguments of a contrast, apart from `temperature`, which `check_temperature` returned.

    `index` follows "student" and "teacher" in errors.
    """
    for side, rows in (("student", student), ("teacher", teacher)):
        if not isinstance(rows, Tensor):
            raise TypeError(f"{function}: {side}{index} is a {type(rows).__name__}; expected a tensor (rows, D)")
        if rows.dtype not in SUPPORTED:
            raise TypeError(f"{function}: {side}{index} has dtype {rows.dtype}; expected {_DTYPES}")
        if rows.dim() != 2:
            raise ValueError(
                f"{function}: {side}{index} has shape {tuple(rows.shape)}; expected (rows, D), use .flatten(1)"
            )
        if rows.numel() == 0:
            raise ValueError(
                f"{function}: {side}{index} has shape {tuple(rows.shape)}, which is empty; expected at least one row "
                "and one column"
            )
    if student.dtype != teacher.dtype:
        raise TypeError(
            f"{function}: teacher{index} has dtype {teacher.dtype} but student{index} has {student.dtype}; "
            "convert one with .to(dtype)"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"{function}: teacher{index} is on {teacher.device} but student{index} is on {student.device}; "
            "move both to one device"
        )
    (batch, width), (keys, teacher_width) = student.shape, teacher.shape
    if width != teacher_width:
        raise ValueError(
            f"{function}: teacher{index} has {teacher_width} columns but student{index} has {width}; "
            "project the student to the teacher's width first"
        )
    if positive_offset < 0:
        raise ValueError(f"{function}: positive_offset is {positive_offset}; expected 0 or more")
    if keys < positive_offset + batch:
        raise ValueError(
            f"{function}: teacher{index} has {keys} rows but student{index} has {batch}; with positive_offset="
            f"{positive_offset} expected at least {positive_offset + batch} teacher rows, one positive per student row"
        )
    if direction not in DIRECTIONS:
        raise ValueError(f"{function}: direction is {direction!r}; expected one of {', '.join(DIRECTIONS)}")
    if (student_ids is None) != (teacher_ids is None):
        given, absent = ("teacher_ids", "student_ids") if student_ids is None else ("student_ids", "teacher_ids")
        raise ValueError(f"{function}: got {given} without {absent}; pass both or neither")
    if student_ids is not None and teacher_ids is not None:
        student_ids = _check_ids(f"{function}: student_ids", student_ids, student)
        teacher_ids = _check_ids(f"{function}: teacher_ids", teacher_ids, teacher)
    return Contrast(
        student, teacher, temperature, student_ids, teacher_ids, positive_offset, direction, normalize, mean
    )


def _check_ids(name: str, ids: Tensor, rows: Tensor) -> Tensor:
    """The ids as int64."""
    expected = f"({rows.shape[0]},)"
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} is a {type(ids).__name__}; expected an integer tensor {expected}")
    if ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"{name} has dtype {ids.dtype}; expected an integer tensor {expected}")
    if tuple(ids.shape) != (rows.shape[0],):
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; expected {expected}, one id per row")
    if ids.device != rows.device:
        raise ValueError(f"{name} is on {ids.device} but the rows are on {rows.device}; move both to one device")
    return ids.to(torch.int64)


def check_temperature(function: str, temperature: float | Tensor) -> Tensor:
    """The temperature as a 0-d tensor."""
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or temperature.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{function}: temperature is a tensor of shape {tuple(temperature.shape)} and dtype "
                f"{temperature.dtype}; expected a 0-d float32 or float64 tensor, or a float"
            )
        # Reading a value on a GPU would synchronize, and reading a traced one would break the graph.
        if temperature.device.type != "cpu" or torch.compiler.is_compiling():
            return temperature
        value = temperature.item()
    else:
        try:
            value = float(temperature)
        except (TypeError, ValueError):
            raise TypeError(f"{function}: temperature is {temperature!r}; expected a float or a 0-d tensor") from None
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{function}: temperature is {value}; expected a positive finite number, e.g. 0.1")
    if isinstance(temperature, Tensor):
        return temperature
    return torch.scalar_tensor(value, dtype=torch.float64, device=_CPU)


def _function(name: str) -> str:
    return name.partition(":")[0]
