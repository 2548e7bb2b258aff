"""Functional API: validates arguments and calls the ops."""

from collections.abc import Sequence

from torch import Tensor

from lfcc_kernels._checks import DIRECTIONS as DIRECTIONS  # also of this module's API
from lfcc_kernels._checks import (
    REDUCTIONS,
    FeatureMap,
    check_contrast,
    check_filters,
    check_fit,
    check_map,
    check_scales,
    check_temperature,
)
from lfcc_kernels.ops import info_nce as info_nce_ops
from lfcc_kernels.ops import lowpass as lowpass_ops


def lowpass(
    x: Tensor,
    scales: Sequence[int] = (1, 2, 4),
    *,
    row_filters: Tensor | None = None,
    col_filters: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
) -> Tensor:
    """Low-pass a feature map to an s x s grid for every scale s, reading the map once.

    With the filters R_s (s x H) and K_s (s x W) of a scale, Y_s = R_s F K_s^T for every channel's map F
    (LFCC, arXiv 2405.18524; the filters are a reconstruction). Differentiable in `x` and in both filters. Sums are
    accumulated in float32 (float64 for float64).

    Args:
        x: Feature map (B, C, H, W) of any strides (contiguous and channels_last are read in place), or tokens
            (B, N, C) with N = prefix_tokens + H * W, row-major. float64, float32, bfloat16 or float16.
        scales: Sizes of the output grids, each from 1 to min(H, W).
        row_filters: (sum of scales, H), the R_s stacked in the order of `scales`; float32 (float64 if `x` is
            float64). None, together with `col_filters`, is the average over the adaptive windows
            [floor(i H / s), ceil((i + 1) H / s)), equal to `torch.nn.functional.adaptive_avg_pool2d`.
        col_filters: (sum of scales, W), the K_s stacked likewise. Pass both filters or neither.
        grid: (H, W) of tokens; inferred if N - prefix_tokens is a square. Not for maps.
        prefix_tokens: Number of class and register tokens at the front, which are skipped. Not for maps.

    Returns:
        Tensor (B, cells, C) in the dtype of `x`, with cells = sum of s * s. Scales are in the given order,
        row-major within a scale.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value.
    """
    scales = check_scales("lowpass", scales)
    feature_map = check_map("lowpass: x", x, grid, prefix_tokens)
    check_fit(feature_map, scales)
    check_filters(feature_map, scales, row_filters, col_filters)
    return lowpass_ops.lowpass(x, scales, row_filters, col_filters, feature_map.grid, prefix_tokens)


def lowpass_foreach(
    maps: Sequence[Tensor],
    scales: Sequence[int] = (1, 2, 4),
    *,
    filters: Sequence[tuple[Tensor, Tensor]] | None = None,
    grids: Sequence[tuple[int, int] | None] | None = None,
    prefix_tokens: Sequence[int] | None = None,
) -> list[Tensor]:
    """Apply `lowpass` to every map of a list.

    The backend "cuda" runs all maps in one launch, which saves time because the last blocks of a launch leave most of
    a GPU idle. The other backends run one map after the other. The results are those of `lowpass`.

    Args:
        maps: Feature maps (B, C, H, W) or tokens (B, N, C), as for `lowpass`; sizes may differ.
        scales: Sizes of the output grids, the same for all maps.
        filters: One pair (row_filters, col_filters) per map, as for `lowpass`. None is the average for all maps.
        grids: One (H, W) or None per map, as for `lowpass`. None is None for all maps.
        prefix_tokens: One number per map, as for `lowpass`. None is 0 for all maps.

    Returns:
        One tensor (B, cells, C) per map.

    Raises:
        TypeError: As `lowpass`.
        ValueError: As `lowpass`; also if `maps` is empty or the lists differ in length.
    """
    if not maps:
        raise ValueError("lowpass_foreach: maps is empty; expected at least one map")
    for name, entries in (("filters", filters), ("grids", grids), ("prefix_tokens", prefix_tokens)):
        if entries is not None and len(entries) != len(maps):
            raise ValueError(
                f"lowpass_foreach: {name} has length {len(entries)} but maps has length {len(maps)}; expected one "
                "entry per map, or None"
            )
    grids = [None] * len(maps) if grids is None else grids
    prefix_tokens = [0] * len(maps) if prefix_tokens is None else prefix_tokens
    scales = check_scales("lowpass_foreach", scales)
    feature_maps = []
    for n, (x, grid, prefix) in enumerate(zip(maps, grids, prefix_tokens, strict=True)):
        feature_maps.append(check_map(f"lowpass_foreach: maps[{n}]", x, grid, prefix))
        check_fit(feature_maps[-1], scales)
    return lowpass_of_maps(feature_maps, scales, filters)


def lowpass_of_maps(
    feature_maps: Sequence[FeatureMap], scales: tuple[int, ...], filters: Sequence[tuple[Tensor, Tensor]] | None
) -> list[Tensor]:
    """`lowpass_foreach` for maps and scales that are validated already; `filters` are validated here."""
    if filters is not None:
        for feature_map, pair in zip(feature_maps, filters, strict=True):
            check_filters(feature_map, scales, *pair)
    return lowpass_ops.lowpass_foreach(
        [feature_map.x for feature_map in feature_maps],
        scales,
        [] if filters is None else [rows for rows, _ in filters],
        [] if filters is None else [cols for _, cols in filters],
        [feature_map.grid for feature_map in feature_maps],
        [feature_map.prefix_tokens for feature_map in feature_maps],
    )


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
    """InfoNCE between paired rows, without storing the B x K logits.

    With unit rows q (student) and k (teacher) and logits A_ij = <q_i, k_j> / temperature, student_to_teacher is
    LSE_j A_ij - A_ip for row i with the positive p = positive_offset + i (InfoNCE, arXiv 1807.03748).
    teacher_to_student is the same for the B positive columns, with the LSE over the B rows. symmetric is the mean of
    the two. Differentiable in `student`, `teacher` and a tensor `temperature`.

    Args:
        student: (B, D). float64, float32, bfloat16 or float16; sums are accumulated in float32 (float64 for float64).
        teacher: (K, D) of the same dtype and device, with K >= positive_offset + B.
        temperature: Positive number, or a 0-d float32 or float64 tensor, which then gets its exact gradient.
        direction: "student_to_teacher", "teacher_to_student" or "symmetric".
        student_ids: Integers (B,). A pair with equal ids that is not a positive is left out of the denominator, e.g.
            for images of one class. Pass both ids or neither.
        teacher_ids: Integers (K,).
        positive_offset: Column of the first row's positive, for teacher rows gathered from several ranks or a queue.
        normalize: Divide rows by their Euclidean norm, at least 1e-12, as `torch.nn.functional.normalize`.
        reduction: "mean" over the B rows, or "none".

    Returns:
        Tensor of float32 (float64 for float64 inputs), a scalar or (B,) for reduction="none".

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"info_nce: reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    return info_nce_ops.info_nce(
        check_contrast(
            student,
            teacher,
            check_temperature("info_nce", temperature),
            direction,
            student_ids,
            teacher_ids,
            positive_offset,
            normalize,
            reduction == "mean",
        )
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
    """The mean `info_nce` of every pair of two lists.

    The backend "triton" runs all pairs in one op if the student alone needs gradients, the direction is
    student_to_teacher and all pairs have the same numbers of rows; on a GPU the launches of a small pair take longer
    than its computation. Otherwise one pair runs after the other.

    Args:
        students: Tensors (B, D); B must be equal for all if ids are passed, D may differ between pairs.
        teachers: Tensors (K, D), one per student tensor.
        temperature: As for `info_nce`.
        direction: As for `info_nce`.
        student_ids: As for `info_nce`, for all pairs.
        teacher_ids: As for `info_nce`, for all pairs.
        positive_offset: As for `info_nce`.
        normalize: As for `info_nce`.

    Returns:
        Tensor (pairs,) of float32 (float64 for float64 inputs).

    Raises:
        TypeError: As `info_nce`.
        ValueError: As `info_nce`; also if the lists are empty or differ in length.
    """
    if not students or len(students) != len(teachers):
        raise ValueError(
            f"info_nce_foreach: got {len(students)} students and {len(teachers)} teachers; expected two lists of one "
            "length, with at least one pair"
        )
    temperature = check_temperature("info_nce_foreach", temperature)
    options = temperature, direction, student_ids, teacher_ids, positive_offset, normalize, True
    return info_nce_ops.info_nce_foreach([
        check_contrast(student, teacher, *options, function="info_nce_foreach", index=f"s[{n}]")
        for n, (student, teacher) in enumerate(zip(students, teachers, strict=True))
    ])  # fmt: skip
