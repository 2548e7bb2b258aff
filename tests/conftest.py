from collections.abc import Iterator

import pytest
import torch

import lfcc_kernels as lk
from lfcc_kernels.backends import native


@pytest.fixture(autouse=True)
def fixed_seed_and_one_thread() -> Iterator[None]:
    """Tests are small: threads that wait for each other would take most of the time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every backend, and skips those that are not built."""
    if request.param not in lk.available_backends():
        pytest.skip(native.missing)
    with lk.use_backend(request.param):
        yield request.param


@pytest.fixture
def kernels() -> Iterator[None]:
    """Runs the test on the compiled kernels, or skips it."""
    if native.missing:
        pytest.skip(native.missing)
    with lk.use_backend("cpu"):
        yield
