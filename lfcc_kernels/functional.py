"""The pure functions: each checks its arguments, says how to mend them, and calls the op."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lfcc_kernels.ops import info_nce as info_nce_ops
from lfcc_kernels.ops import lowpass as lowpass_ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DIRECTIONS = ("student_to_teacher", "teacher_to_student", "symmetric")
REDUCTIONS = ("mean", "none")


def lowpass(
    x: Tensor,
    scales: Sequence[int] = (1, 2, 4),
    *,
    row_filters: Tensor | None = None,
    col_filters: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
) -> Tensor:
    """Low-pass a feature map to an s x s grid for every scale s, out of one read of the map.

    With the filters R_s (s x H) and K_s (s x W) of a scale, Y_s = R_s F K_s^T for every channel's map F.

    Args:
        x: feature map (B, C, H, W) of any strides (contiguous and channels_last are read in place), or tokens
            (B, N, C) with N = prefix_tokens + H * W, row-major. float64, float32, bfloat16 or float16.
        scales: output grids, each at least 1 and at most min(H, W).
        row_filters: (sum of scales, H), the R_s stacked in the order of `scales`; float32, or float64 beside a
            float64 `x`. None, together with `col_filters`, is the average over the adaptive windows
            [floor(i H / s), ceil((i + 1) H / s)), equal to `adaptive_avg_pool2d`.
        col_filters: (sum of scales, W), the K_s stacked likewise. Both filters or neither.
        grid: (H, W) of tokens; inferred where N - prefix_tokens is a square. Not for maps.
        prefix_tokens: class and register tokens at the front, which are skipped. Not for maps.

    Returns:
        (B, cells, C) in x's dtype with cells = sum of s * s, scales in the given order, row-major inside a scale.
        Sums are float32 (float64 for float64). Differentiable in x and in both filters.

    Raises:
        TypeError, ValueError: on a wrong type, dtype, shape, device or scale, with the mend in the message.
    """
    scales = check_scales(scales)
    grid = _check_lowpass(x, scales, row_filters, col_filters, grid, prefix_tokens)
    return lowpass_ops.lowpass(x, scales, row_filters, col_filters, grid, prefix_tokens)


def lowpass_foreach(
    maps: Sequence[Tensor],
    scales: Sequence[int] = (1, 2, 4),
    *,
    filters: Sequence[tuple[Tensor, Tensor]] | None = None,
    grids: Sequence[tuple[int, int] | None] | None = None,
    prefix_tokens: Sequence[int] | None = None,
) -> list[Tensor]:
    """The `lowpass` of every map of a list; on a GPU with the CUDA kernels, where launches cost, all at once.

    Args:
        maps: feature maps and tokens, as `lowpass` takes them, of any sizes.
        scales: those of all maps.
        filters: (row_filters, col_filters) of every map, as `lowpass` takes them. None is the average.
        grids, prefix_tokens: one entry a map. None is none for all.

    Returns:
        A pyramid (B, cells, C) for every map. Errors are those of `lowpass`, and a ValueError for lists that differ in
        length.
    """
    count = len(maps)
    grids = [None] * count if grids is None else grids
    prefix_tokens = [0] * count if prefix_tokens is None else prefix_tokens
    pairs = [(None, None)] * count if filters is None else filters
    if not count or not len(pairs) == len(grids) == len(prefix_tokens) == count:
        raise ValueError(
            f"lowpass_foreach: {count} maps with {len(pairs)} pairs of filters, {len(grids)} grids and "
            f"{len(prefix_tokens)} prefix_tokens; expected as many of each, at least one"
        )
    scales = check_scales(scales)
    arguments = zip(maps, pairs, grids, prefix_tokens, strict=True)
    checked = [_check_lowpass(x, scales, *pair, grid, prefix) for x, pair, grid, prefix in arguments]
    rows, cols = ([], []) if filters is None else map(list, zip(*filters, strict=True))
    return lowpass_ops.lowpass_foreach(list(maps), scales, rows, cols, checked, list(prefix_tokens))


def info_nce(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    direction: str = "student_to_teacher",
    student_ids: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    positive_offset: int = 0,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """In-batch contrastive loss between paired rows; the B x K matrix of similarities is never held.

    With unit rows q (student), k (teacher) and A_ij = <q_i, k_j> / temperature, student_to_teacher is
    LSE_j A_ij - A_ip for each row i with its positive p = positive_offset + i; teacher_to_student is the same on
    the B positive columns, with the LSE over the B rows; symmetric is the mean of the two.

    Args:
        student: (B, D). float64, float32, bfloat16 or float16; sums are float32 (float64 for float64).
        teacher: (K, D) of the same dtype and device, K >= positive_offset + B. Gets a gradient where it requires one.
        temperature: positive number, or a 0-d tensor, which then gets its exact gradient.
        direction: "student_to_teacher", "teacher_to_student" or "symmetric".
        student_ids, teacher_ids: integers (B,) and (K,), both or neither. A pair with equal ids that is not a
            positive is left out of the denominator.
        positive_offset: column of the first row's positive, for key sets gathered from ranks or a queue.
        normalize: divide rows by their Euclidean norm, at least 1e-12, as `torch.nn.functional.normalize`.
        reduction: "mean" over the B rows, or "none".

    Returns:
        float32 (float64 for float64 inputs) scalar, or (B,) for "none".

    Raises:
        TypeError, ValueError: on a wrong type, dtype, shape, device or value, with the mend in the message.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"info_nce: reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    temperature, student_ids, teacher_ids = _check_info_nce(
        student, teacher, temperature, direction, student_ids, teacher_ids, positive_offset
    )
    return info_nce_ops.info_nce(
        student,
        teacher,
        temperature,
        student_ids,
        teacher_ids,
        positive_offset,
        direction,
        normalize,
        mean=reduction == "mean",
    )


def info_nce_foreach(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.1,
    direction: str = "student_to_teacher",
    student_ids: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    positive_offset: int = 0,
    normalize: bool = True,
) -> Tensor:
    """The mean `info_nce` of every pair of a list, (pairs,); on a GPU, where launches cost, many small pairs at once.

    Args and errors are those of `info_nce`, which gives the same numbers pair by pair.
    """
    if not students or len(students) != len(teachers):
        raise ValueError(
            f"info_nce_foreach: {len(students)} students and {len(teachers)} teachers; expected as many, at least one"
        )
    options = temperature, direction, student_ids, teacher_ids, positive_offset
    checked = [_check_info_nce(*pair, *options) for pair in zip(students, teachers, strict=True)]
    return info_nce_ops.info_nce_foreach(
        list(students), list(teachers), *checked[0], positive_offset, direction, normalize
    )


def map_size(x: Tensor, grid: tuple[int, int] | None, prefix_tokens: int) -> tuple[int, int]:
    """(H, W) of a feature map (B, C, H, W) or of tokens (B, N, C); raises where `x` is neither."""
    if not isinstance(x, Tensor):
        raise TypeError(f"lowpass: x is a {type(x).__name__}; expected a tensor (B, C, H, W) or (B, N, C)")
    if x.dtype not in DTYPES:
        raise TypeError(f"lowpass: x is {x.dtype}; expected float32, float64, bfloat16 or float16, use x.float()")
    if x.dim() not in (3, 4):
        raise ValueError(f"lowpass: x has shape {tuple(x.shape)}; expected a map (B, C, H, W) or tokens (B, N, C)")
    if 0 in x.shape:
        raise ValueError(f"lowpass: x has shape {tuple(x.shape)}, which is empty; every size must be at least 1")
    if x.dim() == 4:
        if grid is not None or prefix_tokens != 0:
            raise ValueError("lowpass: grid and prefix_tokens describe tokens (B, N, C), but x is a map (B, C, H, W)")
        return x.shape[2], x.shape[3]
    if prefix_tokens < 0:
        raise ValueError(f"lowpass: prefix_tokens is {prefix_tokens}; expected 0 or more")
    cells = x.shape[1] - prefix_tokens
    if grid is None:
        side = math.isqrt(max(cells, 0))
        if side * side != cells or side == 0:
            raise ValueError(
                f"lowpass: {x.shape[1]} tokens less {prefix_tokens} prefix tokens are no square grid; "
                f"pass grid=(H, W), or prefix_tokens= for class and register tokens"
            )
        return side, side
    try:
        height, width = grid
    except (TypeError, ValueError):
        raise TypeError(f"lowpass: grid is {grid!r}; expected two ints (H, W)") from None
    if height < 1 or width < 1 or height * width != cells:
        raise ValueError(
            f"lowpass: grid {height} x {width} with {prefix_tokens} prefix tokens needs "
            f"{prefix_tokens + height * width} tokens, but x has {x.shape[1]}"
        )
    return height, width


def check_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """The scales as a tuple of positive ints; raises where they are not."""
    expected = "expected one or more positive ints, as (1, 2, 4)"
    try:
        checked = tuple(int(s) for s in scales)
    except (TypeError, ValueError):
        raise TypeError(f"lowpass: scales is {scales!r}, not a sequence of positive ints; {expected}") from None
    if not checked or min(checked) < 1 or checked != tuple(scales):
        raise ValueError(f"lowpass: scales is {scales!r}; {expected}")
    return checked


def _check_lowpass(
    x: Tensor,
    scales: tuple[int, ...],
    row_filters: Tensor | None,
    col_filters: Tensor | None,
    grid: tuple[int, int] | None,
    prefix_tokens: int,
) -> list[int]:
    """The grid as the op takes it, empty for a map; raises on what is wrong."""
    height, width = map_size(x, grid, prefix_tokens)
    if max(scales) > min(height, width):
        raise ValueError(
            f"lowpass: scale {max(scales)} is larger than the {height} x {width} map; "
            f"use scales up to {min(height, width)}"
        )
    if (row_filters is None) != (col_filters is None):
        raise ValueError("lowpass: got only one of row_filters and col_filters; give both, or neither for the average")
    if row_filters is not None:
        _check_filters("row_filters", row_filters, (sum(scales), height), x)
        _check_filters("col_filters", col_filters, (sum(scales), width), x)
    return [height, width] if x.dim() == 3 else []


def _check_filters(name: str, filters: Tensor, shape: tuple[int, int], x: Tensor) -> None:
    if not isinstance(filters, Tensor):
        raise TypeError(f"lowpass: {name} is a {type(filters).__name__}; expected a tensor {shape}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if filters.dtype != dtype:
        raise TypeError(f"lowpass: {name} is {filters.dtype} beside x of {x.dtype}; expected {dtype}")
    if tuple(filters.shape) != shape:
        raise ValueError(
            f"lowpass: {name} has shape {tuple(filters.shape)}; expected {shape}, the sum of scales by the map's side"
        )
    if filters.device != x.device:
        raise ValueError(f"lowpass: {name} is on {filters.device}, x on {x.device}; move them to one device")


def _check_info_nce(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor,
    direction: str,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    positive_offset: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Temperature and ids as the ops take them; raises on what is wrong."""
    _check_pair(student, teacher, positive_offset)
    if direction not in DIRECTIONS:
        raise ValueError(f"info_nce: direction is {direction!r}; expected one of {', '.join(DIRECTIONS)}")
    if (student_ids is None) != (teacher_ids is None):
        raise ValueError("info_nce: got ids for one side only; give student_ids and teacher_ids, or neither")
    if student_ids is not None and teacher_ids is not None:
        student_ids = _check_ids("student_ids", student_ids, student)
        teacher_ids = _check_ids("teacher_ids", teacher_ids, teacher)
    return _check_temperature(temperature), student_ids, teacher_ids


def _check_pair(student: Tensor, teacher: Tensor, positive_offset: int) -> None:
    for name, rows in (("student", student), ("teacher", teacher)):
        if not isinstance(rows, Tensor):
            raise TypeError(f"info_nce: {name} is a {type(rows).__name__}; expected a tensor (rows, D)")
        if rows.dtype not in DTYPES:
            raise TypeError(f"info_nce: {name} is {rows.dtype}; expected float32, float64, bfloat16 or float16")
        if rows.dim() != 2:
            raise ValueError(f"info_nce: {name} has shape {tuple(rows.shape)}; expected (rows, D), use flatten(1)")
        if 0 in rows.shape:
            raise ValueError(f"info_nce: {name} has shape {tuple(rows.shape)}, which is empty")
    if student.dtype != teacher.dtype:
        raise TypeError(f"info_nce: student is {student.dtype}, teacher {teacher.dtype}; cast one with .to(dtype)")
    if student.device != teacher.device:
        raise ValueError(f"info_nce: student is on {student.device}, teacher on {teacher.device}; move one")
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"info_nce: student rows have {student.shape[1]} values, teacher rows {teacher.shape[1]}; "
            "project the student to the teacher's width first"
        )
    if positive_offset < 0 or teacher.shape[0] < positive_offset + student.shape[0]:
        raise ValueError(
            f"info_nce: {student.shape[0]} student rows at positive_offset {positive_offset} have their positives in "
            f"columns {positive_offset} to {positive_offset + student.shape[0] - 1}, but there are "
            f"{teacher.shape[0]} teacher rows"
        )


def _check_ids(name: str, ids: Tensor, rows: Tensor) -> Tensor:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"info_nce: {name} is {got}; expected an integer tensor ({rows.shape[0]},)")
    if tuple(ids.shape) != (rows.shape[0],):
        raise ValueError(f"info_nce: {name} has shape {tuple(ids.shape)}; expected ({rows.shape[0]},), one id a row")
    if ids.device != rows.device:
        raise ValueError(f"info_nce: {name} is on {ids.device}, the rows on {rows.device}; move one")
    return ids.to(torch.int64)


def _check_temperature(temperature: float | Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or temperature.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"info_nce: temperature is a tensor {tuple(temperature.shape)} of {temperature.dtype}; "
                "expected a 0-d float32 or float64 tensor, or a float"
            )
        # A value on a GPU, or one being traced, is not read here: that would synchronise or break the graph.
        if temperature.device.type != "cpu" or torch.compiler.is_compiling():
            return temperature
        value = temperature.item()
    else:
        try:
            value = float(temperature)
        except (TypeError, ValueError):
            raise TypeError(f"info_nce: temperature is {temperature!r}; expected a float or a 0-d tensor") from None
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"info_nce: temperature is {value}; expected a positive finite number, as 0.1")
    if isinstance(temperature, Tensor):
        return temperature
    return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")
