"""The CUDA kernels on the CPU in several schedules, and their shared memory.

All other tests run them in order, as another backend (tests/conftest.py).
"""

import ctypes
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from emulation import build
from emulation.cases import CASES, CHANNELS_LAST, CONTIGUOUS, contrast, pyramids, results_of
from torch import randn

import lfcc_kernels as lk
from lfcc_kernels.backends import cuda

pytestmark = pytest.mark.skipif(bool(cuda.missing()) or cuda.device() != "cpu", reason="the kernels are not emulated")

SCHEDULES = (1, 2, 3, 4)  # descending, and three shuffled after every barrier; 0 is ascending


@pytest.fixture
def kernels() -> Iterator[ctypes.CDLL]:
    """The library with the kernels, which also exports functions of the emulation."""
    library = ctypes.CDLL(str(build.library()))
    with lk.use_backend("cuda"):
        yield library
    library.lfcc_emulation_schedule(0)


@pytest.fixture
def in_schedule(kernels: ctypes.CDLL) -> Callable[[int], None]:
    return kernels.lfcc_emulation_schedule


@pytest.mark.parametrize("case", CASES)
def test_same_bits_in_every_schedule(
    in_schedule: Callable[[int], None], request: pytest.FixtureRequest, case: str
) -> None:
    """Detects missing barriers: values read before they are written are NaN, or from the previous tile.

    By default a case runs in order and in one of the other schedules, in turn.
    """
    one = SCHEDULES[list(CASES).index(case) % len(SCHEDULES)]
    function, inputs = CASES[case]()
    in_schedule(0)
    expected = results_of(function, inputs)
    assert all(x.isfinite().all() for x in expected)
    for schedule in SCHEDULES if request.config.option.full else (one,):
        in_schedule(schedule)
        for result, same in zip(results_of(function, inputs), expected, strict=True):
            assert torch.equal(result, same), schedule


LAUNCHES = {
    "lowpass_forward.cu": ["lowpass_forward"],
    "lowpass_input_grad.cu": ["lowpass_input_grad"],
    "lowpass_filter_grad.cu": ["lowpass_filter_grad"],
    "info_nce_fused.cu": ["fused_one_pass", "fused_gradient"],
}


@pytest.mark.parametrize("source", LAUNCHES)
def test_dynamic_shared_memory_is_that_in_the_head_of_the_file(kernels: ctypes.CDLL, source: str) -> None:
    """At shapes with full tiles, and the usual scales."""
    stated = re.search(
        r"^// Dynamic shared memory: at most (\d+) KiB", (build.CSRC / "cuda" / source).read_text(), re.M
    )
    for launch in LAUNCHES[source]:
        kernels.lfcc_emulation_shared_bytes(launch.encode())  # forgets the launches of other tests
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for layout in (CONTIGUOUS, CHANNELS_LAST):
            results_of(*pyramids((1, 64, 56, 56), dtype, layout))
    for width in (64, 128):
        results_of(*contrast(150, 150, width, torch.bfloat16, "symmetric"))
    for launch in LAUNCHES[source]:
        used = kernels.lfcc_emulation_shared_bytes(launch.encode())
        assert 0 < used <= int(stated[1]) << 10 < 1.2 * used


def test_unsupported_scales_raise(in_schedule: Callable[[int], None]) -> None:
    with pytest.raises(RuntimeError, match=r"33 scales.* up to 32, use_backend\('triton'\) or use_backend\('eager'\)"):
        lk.lowpass(randn(1, 1, 40, 40), range(1, 34))
    with pytest.raises(RuntimeError, match=r"12000 filters need more shared memory.*use_backend\('eager'\)"):
        lk.lowpass(randn(1, 1, 12000, 12000).expand(1, 2, -1, -1), (12000,))
