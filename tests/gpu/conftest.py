"""The GPU tests' device."""

from collections.abc import Iterator

import pytest
import torch

import lfcc_kernels as lk
from lfcc_kernels.backends import triton


@pytest.fixture
def device() -> Iterator[torch.device]:
    if reason := "TRITON_INTERPRET is set" if triton.INTERPRET else triton.missing():
        pytest.skip(reason)
    with lk.use_backend("triton"):
        yield torch.device("cuda", torch.cuda.current_device())
