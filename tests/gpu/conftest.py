"""The device of the GPU tests, with every backend that has GPU kernels."""

from collections.abc import Iterator

import pytest
import torch

import lfcc_kernels as lk
from lfcc_kernels.backends import triton
from lfcc_kernels.ops.dispatch import why_missing


@pytest.fixture(params=["triton", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    reason = why_missing(request.param)
    if not torch.cuda.is_available() or (request.param == "triton" and triton.INTERPRET):
        reason = reason or "the kernels run on the CPU here"
    if reason:
        pytest.skip(reason)
    with lk.use_backend(request.param):
        yield torch.device("cuda", torch.cuda.current_device())
