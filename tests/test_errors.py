"""Every invalid input raises an exception that states what was received, what was expected and what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, randn

import lfcc_kernels as lk

MAP, TOKENS, ROWS = randn(2, 3, 8, 6), randn(2, 48, 3), randn(4, 5)


def on_meta(tensor: Tensor) -> Tensor:
    """On a second device, available on every machine."""
    return tensor.to("meta")


# x, further arguments, exception, parts of the message: what was received, then what was expected or what to do
LOWPASS: dict[str, tuple[Any, dict[str, Any], type[Exception], list[str]]] = {
    "x is not a tensor": (MAP.numpy(), {}, TypeError, ["ndarray", "expected a tensor"]),
    "x is a list": ([MAP], {}, TypeError, ["list", "expected a tensor"]),
    "x of integers": (MAP.long(), {}, TypeError, ["torch.int64", ".float()"]),
    "x of complex numbers": (MAP.cfloat(), {}, TypeError, ["torch.complex64", "float32"]),
    "x of two dimensions": (ROWS, {}, ValueError, ["(4, 5)", "(B, C, H, W)"]),
    "x of five dimensions": (MAP[None], {}, ValueError, ["(1, 2, 3, 8, 6)", "(B, C, H, W)"]),
    "empty batch": (MAP[:0], {}, ValueError, ["(0, 3, 8, 6)", "empty"]),
    "no channels": (MAP[:, :0], {}, ValueError, ["(2, 0, 8, 6)", "empty"]),
    "no rows": (MAP[:, :, :0], {}, ValueError, ["(2, 3, 0, 6)", "empty"]),
    "no scale": (MAP, {"scales": ()}, ValueError, ["()", "positive ints"]),
    "scale zero": (MAP, {"scales": (1, 0)}, ValueError, ["(1, 0)", "positive ints"]),
    "negative scale": (MAP, {"scales": (2, -1)}, ValueError, ["(2, -1)", "positive ints"]),
    "half a scale": (MAP, {"scales": (1, 2.5)}, ValueError, ["(1, 2.5)", "positive ints"]),
    "one number for scales": (MAP, {"scales": 4}, TypeError, ["4", "sequence of positive ints"]),
    "scales of words": (MAP, {"scales": ("one",)}, (TypeError, ValueError), ["one", "positive ints"]),
    "scales of None": (MAP, {"scales": (None,)}, TypeError, ["None", "positive ints"]),
    "scale larger than the map": (MAP, {"scales": (1, 7)}, ValueError, ["scale 7", "8 x 6", "up to 6"]),
    "grid of a map": (MAP, {"grid": (8, 6)}, ValueError, ["grid", "is a map"]),
    "prefix of a map": (MAP, {"prefix_tokens": 1}, ValueError, ["prefix_tokens", "is a map"]),
    "non-square tokens without a grid": (TOKENS, {}, ValueError, ["48 tokens", "grid=(H, W)"]),
    "a class token unmentioned": (randn(2, 50, 3), {}, ValueError, ["50 tokens", "prefix_tokens=0", "square grid"]),
    "only prefix tokens": (TOKENS, {"prefix_tokens": 48}, ValueError, ["prefix_tokens=48", "square grid"]),
    "more prefix tokens than tokens": (TOKENS, {"prefix_tokens": 50}, ValueError, ["prefix_tokens=50"]),
    "negative prefix": (TOKENS, {"prefix_tokens": -1}, ValueError, ["prefix_tokens is -1", "0 or more"]),
    "grid that does not fit": (TOKENS, {"grid": (7, 7)}, ValueError, ["grid=(7, 7)", "needs 49", "48 tokens"]),
    "grid without room for the prefix": (
        TOKENS, {"grid": (8, 6), "prefix_tokens": 1}, ValueError, ["grid=(8, 6)", "needs 49", "48 tokens"],
    ),
    "negative grid": (TOKENS, {"grid": (-8, -6)}, ValueError, ["grid=(-8, -6)"]),
    "grid of one number": (TOKENS, {"grid": 7}, (TypeError, ValueError), ["7", "(H, W)"]),
    "grid of three numbers": (TOKENS, {"grid": (2, 4, 6)}, (TypeError, ValueError), ["(2, 4, 6)", "(H, W)"]),
    "scale larger than the grid": (TOKENS, {"grid": (24, 2)}, ValueError, ["scale 4", "24 x 2", "up to 2"]),
    "one filter": (MAP, {"row_filters": randn(7, 8)}, ValueError, ["row_filters without col_filters", "both"]),
    "the other filter": (MAP, {"col_filters": randn(7, 6)}, ValueError, ["col_filters without row_filters", "both"]),
    "filters of another height": (
        MAP, {"row_filters": randn(7, 6), "col_filters": randn(7, 6)}, ValueError,
        ["row_filters", "(7, 6)", "(7, 8)"],
    ),
    "filters of other scales": (
        MAP, {"row_filters": randn(7, 8), "col_filters": randn(3, 6)}, ValueError,
        ["col_filters", "(3, 6)", "(7, 6)"],
    ),
    "filters of another type": (
        MAP, {"row_filters": randn(7, 8).double(), "col_filters": randn(7, 6).double()}, TypeError,
        ["row_filters", "torch.float64", "expected torch.float32"],
    ),
    "16-bit filters of a 16-bit map": (
        MAP.half(), {"row_filters": randn(7, 8).half(), "col_filters": randn(7, 6).half()}, TypeError,
        ["row_filters", "torch.float16", "expected torch.float32"],
    ),
    "filters on another device": (
        MAP, {"row_filters": on_meta(randn(7, 8)), "col_filters": on_meta(randn(7, 6))}, ValueError,
        ["row_filters is on meta", "map is on", "move"],
    ),
    "filters that are not tensors": (
        MAP, {"row_filters": [[1.0]], "col_filters": [[1.0]]}, TypeError, ["row_filters", "list", "tensor"],
    ),
}  # fmt: skip

# student, teacher, further arguments, exception, parts of the message
INFO_NCE: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], list[str]]] = {
    "student is not a tensor": (ROWS.numpy(), ROWS, {}, TypeError, ["student", "ndarray", "expected a tensor"]),
    "teacher is not a tensor": (ROWS, [1.0], {}, TypeError, ["teacher", "list", "expected a tensor"]),
    "integers": (ROWS, ROWS.long(), {}, TypeError, ["teacher", "torch.int64", "float32"]),
    "two types": (ROWS, ROWS.double(), {}, TypeError, ["torch.float32", "torch.float64", ".to(dtype)"]),
    "two devices": (ROWS, on_meta(ROWS), {}, ValueError, ["student is on", "teacher is on meta", "move"]),
    "maps": (MAP, MAP, {}, ValueError, ["student", "(2, 3, 8, 6)", "flatten(1)"]),
    "one row as a vector": (ROWS, ROWS[0], {}, ValueError, ["teacher", "(5,)", "(rows, D)"]),
    "empty batch": (ROWS[:0], ROWS, {}, ValueError, ["student", "(0, 5)", "empty"]),
    "empty keys": (ROWS, ROWS[:0], {}, ValueError, ["teacher", "(0, 5)", "empty"]),
    "empty rows": (ROWS[:, :0], ROWS[:, :0], {}, ValueError, ["(4, 0)", "empty"]),
    "two widths": (ROWS, randn(4, 6), {}, ValueError, ["student has 5", "teacher has 6 columns", "project"]),
    "fewer keys than rows": (ROWS, ROWS[:3], {}, ValueError, ["student has 4", "teacher has 3 rows", "at least 4"]),
    "offset past the keys": (
        ROWS, ROWS, {"positive_offset": 1}, ValueError, ["positive_offset=1", "at least 5 teacher rows"],
    ),
    "negative offset": (ROWS, ROWS, {"positive_offset": -1}, ValueError, ["positive_offset is -1", "0 or more"]),
    "unknown direction": (ROWS, ROWS, {"direction": "both"}, ValueError, ["'both'", "symmetric"]),
    "unknown reduction": (ROWS, ROWS, {"reduction": "sum"}, ValueError, ["'sum'", "mean", "none"]),
    "ids of the student only": (
        ROWS, ROWS, {"student_ids": torch.arange(4)}, ValueError, ["student_ids without teacher_ids", "both"],
    ),
    "ids of the teacher only": (
        ROWS, ROWS, {"teacher_ids": torch.arange(4)}, ValueError, ["teacher_ids without student_ids", "both"],
    ),
    "too few ids": (
        ROWS, ROWS, {"student_ids": torch.arange(3), "teacher_ids": torch.arange(4)}, ValueError,
        ["student_ids", "(3,)", "(4,)"],
    ),
    "too many ids": (
        ROWS, ROWS, {"student_ids": torch.arange(4), "teacher_ids": torch.arange(5)}, ValueError,
        ["teacher_ids", "(5,)", "(4,)"],
    ),
    "ids of two dimensions": (
        ROWS, ROWS, {"student_ids": torch.ones(4, 1).int(), "teacher_ids": torch.arange(4)}, ValueError,
        ["student_ids", "(4, 1)"],
    ),
    "ids of floats": (
        ROWS, ROWS, {"student_ids": torch.ones(4), "teacher_ids": torch.ones(4)}, TypeError,
        ["student_ids", "torch.float32", "integer"],
    ),
    "ids as a list": (
        ROWS, ROWS, {"student_ids": [0, 1, 2, 3], "teacher_ids": [0, 1, 2, 3]}, TypeError,
        ["student_ids", "list", "integer tensor"],
    ),
    "ids on another device": (
        ROWS, ROWS, {"student_ids": on_meta(torch.arange(4)), "teacher_ids": torch.arange(4)}, ValueError,
        ["student_ids is on meta", "rows are on", "move"],
    ),
}  # fmt: skip

TEMPERATURES: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "zero": (0.0, ValueError, ["0.0", "positive finite"]),
    "negative": (-0.1, ValueError, ["-0.1", "positive finite"]),
    "infinite": (float("inf"), ValueError, ["inf", "positive finite"]),
    "not a number": (float("nan"), ValueError, ["nan", "positive finite"]),
    "a word": ("hot", TypeError, ["hot", "float"]),
    "None": (None, TypeError, ["None", "float"]),
    "zero in a tensor": (torch.tensor(0.0), ValueError, ["0.0", "positive finite"]),
    "not a number in a tensor": (torch.tensor(torch.nan), ValueError, ["nan", "positive finite"]),
    "a vector": (torch.ones(1), TypeError, ["(1,)", "0-d"]),
    "an integer tensor": (torch.tensor(1), TypeError, ["torch.int64", "float32 or float64"]),
    "a half": (torch.tensor(0.1).half(), TypeError, ["torch.float16", "float32 or float64"]),
}

STAGES = {"student_channels": [3, 4], "teacher_channels": [5, 6]}
STUDENT, TEACHER = [randn(2, 3, 8, 8), randn(2, 4, 4, 4)], [randn(2, 5, 8, 8), randn(2, 6, 4, 4)]

# Call that builds or runs a module, exception, parts of the message
MODULES: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "unknown filter": (lambda: lk.LowPassPyramid((1, 2), "box"), ValueError, ["'box'", "average"]),
    "pyramid without scales": (lambda: lk.LowPassPyramid(()), ValueError, ["()", "positive ints"]),
    "pyramid larger than the map": (
        lambda: lk.LowPassPyramid((9,), "dct")(MAP), ValueError, ["LowPassPyramid: x", "scale 9", "8 x 6"],
    ),
    "pyramid of a list": (lambda: lk.LowPassPyramid()([1]), TypeError, ["list", "expected a tensor"]),
    "loss with zero temperature": (lambda: lk.InfoNCELoss(0.0), ValueError, ["0.0", "positive finite"]),
    "loss with endless temperature": (
        lambda: lk.InfoNCELoss(float("inf"), learnable_temperature=True), ValueError,
        ["inf", "positive finite"],
    ),
    "loss with unknown direction": (
        lambda: lk.InfoNCELoss(direction="up"), ValueError, ["'up'", "symmetric"],
    ),
    "loss with unknown gather": (
        lambda: lk.InfoNCELoss(gather="all"), ValueError, ["'all'", "'auto', 'none'"],
    ),
    "ids on one side": (
        lambda: lk.InfoNCELoss()(ROWS, ROWS, student_ids=torch.arange(4)), ValueError, ["without teacher_ids"],
    ),
    "stages that differ": (
        lambda: lk.LFCCLoss([3, 4], [5]),
        ValueError,
        ["student_channels has 2 stages", "teacher_channels has 1", "same number"],
    ),
    "no stages": (lambda: lk.LFCCLoss([], []), ValueError, ["0 stages", "at least one"]),
    "trainable teacher": (
        lambda: lk.LFCCLoss([3], [5], teacher_filter="learnable"), ValueError,
        ["learnable", "teacher_filter='average'"],
    ),
    "unknown teacher filter": (
        lambda: lk.LFCCLoss([3], [5], teacher_filter="box"), ValueError, ["'box'", "average"],
    ),
    "scales that are not ints": (
        lambda: lk.LFCCLoss([3], [5], scales=(0.5,)), ValueError, ["LFCCLoss: scales", "(0.5,)", "positive ints"],
    ),
    "too few features": (
        lambda: lk.LFCCLoss(**STAGES)(STUDENT[:1], TEACHER), ValueError,
        ["student_features", "1 tensors", "list of 2"],
    ),
    "too many features": (
        lambda: lk.LFCCLoss(**STAGES)(STUDENT, TEACHER * 2), ValueError,
        ["teacher_features", "4 tensors", "list of 2"],
    ),
    "a tensor for a list": (
        lambda: lk.LFCCLoss(**STAGES)(STUDENT, TEACHER[0]), ValueError,
        ["teacher_features", "one tensor", "list of 2"],
    ),
    "student and teacher exchanged": (
        lambda: lk.LFCCLoss(**STAGES)(TEACHER, STUDENT), ValueError,
        ["teacher_features[0]", "(2, 3, 8, 8)", "3 channels", "teacher_channels[0] is 5"],
    ),
    "channels last in a map": (
        lambda: lk.LFCCLoss([3], [5])([randn(2, 8, 8, 3)], TEACHER[:1]), ValueError,
        ["student_features[0]", "8 channels", "(B, C, H, W)"],
    ),
    "features of two batches": (
        lambda: lk.LFCCLoss([3], [5])([randn(3, 3, 8, 8)], TEACHER[:1]), ValueError,
        ["stage 0", "3 student rows", "2 teacher rows"],
    ),
    "teacher's batch larger": (
        lambda: lk.LFCCLoss([3], [5])(STUDENT[:1], [randn(3, 5, 8, 8)]), ValueError, ["2", "3"],
    ),
    "features of two dimensions": (
        lambda: lk.LFCCLoss([3], [5])([randn(2, 3)], TEACHER[:1]),
        ValueError,
        ["student_features[0]", "(2, 3)", "(B, C, H, W)"],
    ),
    "features that are not tensors": (
        lambda: lk.LFCCLoss([3], [5])([STUDENT[0].cpu().numpy()], TEACHER[:1]), TypeError,
        ["student_features[0]", "ndarray", "tensor"],
    ),
    "tokens without a grid": (
        lambda: lk.LFCCLoss([3], [5])([TOKENS], TEACHER[:1]), ValueError,
        ["student_features[0]", "48 tokens", "student_grid=(H, W)"],
    ),
    "map smaller than a scale": (
        lambda: lk.LFCCLoss([3], [5])([randn(2, 3, 3, 3)], TEACHER[:1]), ValueError,
        ["student_features[0]", "scale 4", "3 x 3"],
    ),
    "second map of a list": (
        lambda: lk.lowpass_foreach([MAP, ROWS], (1, 2)), ValueError, ["lowpass_foreach: maps[1]", "(4, 5)"],
    ),
    "second pair of a list": (
        lambda: lk.info_nce_foreach([ROWS, ROWS], [ROWS, ROWS[:3]]), ValueError,
        ["info_nce_foreach: teachers[1] has 3 rows", "students[1] has 4"],
    ),
    "second stage smaller than a scale": (
        lambda: lk.LFCCLoss(**STAGES)([STUDENT[0], randn(2, 4, 3, 5)], TEACHER), ValueError,
        ["student_features[1]", "scale 4", "3 x 5", "up to 3"],
    ),
    "too few ids": (
        lambda: lk.LFCCLoss(**STAGES)(STUDENT, TEACHER, torch.arange(3)), ValueError, ["ids", "(3,)", "(2,)"],
    ),
    "pyramids of fewer stages": (
        lambda: lk.LFCCLoss([3], [5]).contrast([randn(2, 21, 5)], []), ValueError, ["has 1 entries", "has 0"],
    ),
}  # fmt: skip


def assert_raises(call: Callable[[], Any], error: type[Exception], fragments: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert not [fragment for fragment in fragments if fragment not in message], message


@pytest.mark.parametrize(("x", "arguments", "error", "fragments"), LOWPASS.values(), ids=LOWPASS)
def test_lowpass(x: Any, arguments: dict[str, Any], error: type[Exception], fragments: list[str]) -> None:
    assert_raises(lambda: lk.lowpass(x, **arguments), error, ["lowpass: ", *fragments])


@pytest.mark.parametrize(("student", "teacher", "arguments", "error", "fragments"), INFO_NCE.values(), ids=INFO_NCE)
def test_info_nce(
    student: Any, teacher: Any, arguments: dict[str, Any], error: type[Exception], fragments: list[str]
) -> None:
    assert_raises(lambda: lk.info_nce(student, teacher, **arguments), error, ["info_nce: ", *fragments])


@pytest.mark.parametrize(("temperature", "error", "fragments"), TEMPERATURES.values(), ids=TEMPERATURES)
def test_temperature(temperature: Any, error: type[Exception], fragments: list[str]) -> None:
    assert_raises(lambda: lk.info_nce(ROWS, ROWS, temperature=temperature), error, ["temperature is", *fragments])


@pytest.mark.parametrize(("call", "error", "fragments"), MODULES.values(), ids=MODULES)
def test_modules(call: Callable[[], Any], error: type[Exception], fragments: list[str]) -> None:
    assert_raises(call, error, fragments)


def test_every_backend(backend: str) -> None:
    """Arguments are checked before a backend is selected, so one call of each function is enough."""
    with pytest.raises(ValueError, match="lowpass: "):
        lk.lowpass(randn(2, 3, 8, 6), (7,))
    with pytest.raises(ValueError, match="info_nce: "):
        lk.info_nce(randn(4, 5), randn(3, 5))
