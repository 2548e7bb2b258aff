"""The compiled kernels refuse, by themselves, what would make them read or write memory that is not theirs."""

from typing import Any

import pytest
import torch
from op_cases import CALLS, constants
from torch import randn

from lfcc_kernels.backends import cuda
from lfcc_kernels.ops.dispatch import why_missing
from lfcc_kernels.ops.registration import op

# A call of op_cases.CALLS, the position of one argument in it, and what breaks it there.
BROKEN_CALLS: dict[str, tuple[str, int, Any]] = {
    "tokens that do not fit the grid": ("tokens", 4, [8, 5]),
    "a prefix that does not fit": ("tokens", 5, 2),
    "filters of another height": ("filters", 2, randn(3, 6)),
    "filters of another type": ("filters", 2, randn(3, 7).half()),
    "a negative scale": ("average", 1, [-1]),
    "a map without columns": ("average", 0, randn(2, 3, 7)),
    "a gradient of other cells": ("gradient of a map", 0, randn(2, 4, 3)),
    "a gradient of another batch": ("gradient of a map", 0, randn(1, 5, 3)),
    "a gradient of other channels": ("gradient of filters", 0, randn(2, 5, 2)),
    "a gradient of another type": ("gradient of filters", 0, randn(2, 5, 3).half()),
    "fewer keys than positives": ("rows", 5, 3),
    "negative offset": ("one pass", 5, -1),
    "two widths": ("one pass", 1, randn(6, 7)),
    "two types": ("rows", 1, randn(6, 8).half()),
    "ids too few": ("one pass with ids", 3, torch.arange(3)),
    "ids of another type": ("one pass with ids", 4, torch.arange(6).int()),
    "ids on one side": ("one pass with ids", 4, None),
    "two temperatures": ("rows", 2, torch.ones(2)),
    "a temperature of another type": ("rows", 2, torch.ones(()).half()),
    "fewer gradients than rows": ("gradient of rows", 0, randn(3)),
    "gradients of another type": ("gradient of rows", 0, randn(4).half()),
    "fewer log-sum-exps than rows": ("gradient of rows", 9, randn(3)),
    "filters of one side": ("filters", 3, None),
    "no log-sum-exps of the columns": ("gradient of both, of the teacher", 10, randn(0)),
}


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize(("call", "position", "argument"), BROKEN_CALLS.values(), ids=BROKEN_CALLS)
def test_kernels_guard_memory(call: str, position: int, argument: Any, backend: str) -> None:
    if reason := why_missing(backend) or ("seen on the CPU" if backend == "cuda" and cuda.device() != "cpu" else ""):
        pytest.skip(reason)
    name, arguments = CALLS[call]
    broken = list(constants(*arguments()))
    broken[position] = argument
    with pytest.raises((RuntimeError, IndexError)):
        op(name, backend)(*broken)
