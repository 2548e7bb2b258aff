"""The compiled kernels reject arguments that would make them access memory out of bounds."""

import re
from typing import Any

import pytest
import torch
from op_cases import CALLS, constants, skip_unless_implemented
from torch import randn

from lfcc_kernels.backends import cuda
from lfcc_kernels.ops.dispatch import why_missing
from lfcc_kernels.ops.registration import op

# A call of op_cases.CALLS, the position of one argument in it, what replaces it, and the error without "lfcc::OP: ".
BROKEN_CALLS: list[tuple[str, int, Any, str]] = [
    ("average", 0, randn(3, 7), "x has 2 dimensions, expected 4 for a map (B, C, H, W) or 3 for tokens (B, N, C)"),
    ("average", 0, torch.ones(2, 3, 7, 5).int(), "x is (2, 3, 7, 5) int32, expected float64, float32, bfloat16 or"),
    ("average", 0, randn(2, 3, 7), "grid is [], expected [H, W] of the tokens, both positive"),
    ("average", 4, [7, 5], "x is a map (B, C, H, W), which takes no grid and no prefix_tokens, but got grid=[7, 5]"),
    ("average", 5, 1, "x is a map (B, C, H, W), which takes no grid and no prefix_tokens, but got grid=[] and prefix"),
    ("tokens", 4, [7], "grid is [7], expected [H, W] of the tokens, both positive"),
    ("tokens", 4, [-7, -5], "grid is [-7, -5], expected [H, W] of the tokens, both positive"),
    ("tokens", 4, [8, 5], "x has 36 tokens, expected 41 for grid=[8, 5] and prefix_tokens=1"),
    ("tokens", 5, 2, "x has 36 tokens, expected 37 for grid=[7, 5] and prefix_tokens=2"),
    ("tokens", 5, -1, "prefix_tokens is -1, expected 0 or more"),
    ("average", 1, [-1], "scales has -1, expected 1 to 5 for a map of 7 x 5"),
    ("average", 1, [1, 6], "scales has 6, expected 1 to 5 for a map of 7 x 5"),
    ("filters", 2, randn(3, 6), "row_filters is (3, 6) float32, expected (3, 7) float32"),
    ("filters", 2, randn(3, 7).half(), "row_filters is (3, 7) float16, expected (3, 7) float32"),
    ("filters", 2, randn(21), "row_filters is (21,) float32, expected (3, 7) float32"),
    ("filters", 3, randn(2, 5), "col_filters is (2, 5) float32, expected (3, 5) float32"),
    ("filters", 2, None, "row_filters is missing, expected both filters or neither"),
    ("filters", 3, None, "col_filters is missing, expected both filters or neither"),
    ("gradient of a map", 0, randn(2, 4, 3), "grad is (2, 4, 3) float32, expected (2, 5, 3) float32"),
    ("gradient of a map", 0, randn(1, 5, 3), "grad is (1, 5, 3) float32, expected (2, 5, 3) float32"),
    ("gradient of a map", 1, [2, 3], "size has 2 dimensions, expected 4 for a map (B, C, H, W) or 3 for tokens"),
    ("gradient of tokens", 1, [2, 35, 3], "size has 35 tokens, expected 36 for grid=[7, 5] and prefix_tokens=1"),
    ("gradient of filters", 0, randn(2, 5, 2), "grad is (2, 5, 2) float32, expected (2, 5, 3) float32"),
    ("gradient of filters", 0, randn(2, 5, 3).half(), "grad is (2, 5, 3) float16, expected (2, 5, 3) float32"),
    ("rows", 0, randn(8), "student is (8,) float32, expected two dimensions, (rows, width)"),
    ("rows", 1, randn(6, 2, 4), "teacher is (6, 2, 4) float32, expected two dimensions, (rows, width)"),
    ("one pass", 1, randn(6, 7), "student is (4, 8) float32, teacher is (6, 7) float32; both need the same width"),
    ("rows", 1, randn(6, 8).half(), "student is (4, 8) float32, teacher is (6, 8) float16; both need the same dtype"),
    ("one pass", 5, -1, "positive_offset is -1, expected 0 or more"),
    ("rows", 5, 3, "teacher has 6 rows, expected at least 7 for positive_offset=3 and 4 student rows"),
    ("one pass with ids", 3, torch.arange(3), "student_ids is (3,) int64, expected (4,) int64"),
    ("one pass with ids", 4, torch.arange(6).int(), "teacher_ids is (6,) int32, expected (6,) int64"),
    ("one pass with ids", 3, None, "student_ids is missing, expected the ids of both sides or neither"),
    ("one pass with ids", 4, None, "teacher_ids is missing, expected the ids of both sides or neither"),
    ("rows", 2, torch.ones(2), "temperature is (2,) float32, expected one value of float64 or float32"),
    ("rows", 2, torch.ones(()).half(), "temperature is () float16, expected one value of float64 or float32"),
    ("rows", 2, torch.tensor(-1.0), "temperature is -1; expected a positive finite number, such as 0.1"),
    ("rows", 2, torch.tensor(torch.nan), "temperature is nan; expected a positive finite number, such as 0.1"),
    ("gradient of rows", 0, randn(3), "grad is (3,) float32, expected (4,) float32"),
    ("gradient of rows", 0, randn(4).half(), "grad is (4,) float16, expected (4,) float32"),
    ("gradient of rows", 9, randn(3), "row_lse is (3,) float32, expected (4,) float32"),
    ("gradient of both, of the teacher", 10, randn(0), "col_lse is (0,) float32, expected (4,) float32"),
    ("many maps with filters", 0, [], "maps is empty, expected at least one tensor"),
    ("many maps", 0, [randn(2, 3, 7, 5), randn(2, 3, 9, 8), randn(2, 36)], "maps[2] has 2 dimensions, expected 4 for"),
    ("many maps", 0, [randn(2, 3, 7, 5), randn(2, 3, 9, 8).half(), randn(2, 36, 3)],
     "maps[1] is (2, 3, 9, 8) float16, the first is (2, 3, 7, 5) float32; all need the same dtype and device"),
    ("many maps", 4, [0, 0, 0, 0], "grids has length 4, expected 6 for 3 maps"),
    ("many maps", 4, [0, 0, 0, 0, 8, 5], "maps[2] has 36 tokens, expected 41 for grid=[8, 5] and prefix_tokens=1"),
    ("many maps", 5, [0, 0], "prefix_tokens has length 2, expected 3 for 3 maps"),
    ("many maps with filters", 2, [randn(3, 7)], "row_filters has length 1, expected 3 for 3 maps"),
    ("many maps with filters", 3, [], "col_filters has length 0, expected 3 for 3 maps"),
    ("many maps with filters", 2, [randn(3, 7)] * 3, "row_filters[1] is (3, 7) float32, expected (3, 9) float32"),
    ("gradient of many maps", 0, [randn(2, 4, 3)] * 3, "grads[0] is (2, 4, 3) float32, expected (2, 5, 3) float32"),
    ("gradient of many maps", 1, [2, 3, 7, 5, 2, 3], "sizes has length 6, expected 4 numbers per map and 3 per tokens"),
    ("gradient of many maps", 2, [0], "channels_last has length 1, expected 3"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize(("call", "position", "argument", "message"), BROKEN_CALLS, ids=[x[3] for x in BROKEN_CALLS])
def test_kernels_guard_memory(call: str, position: int, argument: Any, message: str, backend: str) -> None:
    if reason := why_missing(backend) or ("run on the CPU" if backend == "cuda" and cuda.device() != "cpu" else ""):
        pytest.skip(reason)
    name, arguments = CALLS[call]
    skip_unless_implemented(name, backend)
    broken = list(constants(*arguments()))
    broken[position] = argument
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'lfcc::{name}: {message}')}"):
        op(name, backend)(*broken)
