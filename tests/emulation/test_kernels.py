"""The CUDA kernels on the CPU, as no other test runs them: in changing schedules, and under sanitizers.

Everything else runs them in order, as one more backend (tests/conftest.py).
"""

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from emulation import build
from op_cases import FUNCTIONS, functions
from torch import Tensor, randn

import lfcc_kernels as lk
from lfcc_kernels.backends import cuda
from lfcc_kernels.functional import lowpass_foreach

pytestmark = pytest.mark.skipif(bool(cuda.missing()) or cuda.device() != "cpu", reason="the kernels are not emulated")

TESTS = Path(__file__).parents[1]
SCHEDULES = (1, 2, 3, 4)  # reversed, and three that are drawn anew after every barrier; 0 is in order


@pytest.fixture
def kernels() -> Iterator[ctypes.CDLL]:
    """The library that serves, whose emulation can be asked and told things."""
    library = ctypes.CDLL(str(build.library(sanitize="LFCC_SANITIZED" in os.environ)))
    with lk.use_backend("cuda"):
        yield library
    library.lfcc_emulation_schedule(0)


@pytest.fixture
def in_schedule(kernels: ctypes.CDLL) -> Callable[[int], None]:
    return kernels.lfcc_emulation_schedule


def results_of(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    result = function(*inputs)
    upstream = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view_as(result)
    return [result, *torch.autograd.grad(result, inputs, upstream)]


def contrast(rows: int, width: int, dtype: torch.dtype, direction: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    sides = [randn(rows, width).to(dtype).requires_grad_() for _ in range(2)]
    temperature = torch.tensor(0.1, requires_grad=True)
    return lambda *pair: lk.info_nce(*pair[:2], temperature=pair[2], direction=direction), [*sides, temperature]


def pyramids(size: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> tuple[Callable, list[Tensor]]:
    x = randn(size).to(dtype).to(memory_format=layout).requires_grad_()
    of_sums = torch.float64 if dtype == torch.float64 else torch.float32
    filters = [randn(7, side, dtype=of_sums).requires_grad_() for side in size[2:]]
    return lambda x, rows, cols: lk.lowpass(x, (1, 2, 4), row_filters=rows, col_filters=cols), [x, *filters]


def many_maps() -> tuple[Callable[..., Tensor], list[Tensor]]:
    maps = [randn(2, *size).requires_grad_() for size in ((40, 7, 7), (3, 30, 28), (5, 14, 14))]
    return lambda *maps: torch.cat([y.flatten() for y in lowpass_foreach(maps, (1, 2, 4))]), maps


CASES: dict[str, Callable[[], tuple[Callable[..., Tensor], list[Tensor]]]] = {
    **{name: lambda name=name: functions(torch.float32)[name] for name in FUNCTIONS},
    "many maps": many_maps,
}
for _dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for _layout in (torch.contiguous_format, torch.channels_last):
        for _size in ((2, 40, 7, 7), (1, 9, 56, 40)):  # several maps a tile, several tiles a map
            CASES[f"{_size}, {_dtype}, {_layout}"] = lambda s=_size, d=_dtype, m=_layout: pyramids(s, d, m)
    for _width in (20, 100, 300):  # both widths of fused tiles, and chunks
        for _direction in ("student_to_teacher", "symmetric"):
            CASES[f"{_direction}, {_width}, {_dtype}"] = lambda w=_width, t=_dtype, d=_direction: contrast(150, w, t, d)


@pytest.mark.parametrize("case", CASES)
def test_same_bits_in_every_schedule(in_schedule: Callable[[int], None], case: str) -> None:
    """So that no barrier is missing: what a warp reads before another has written it is NaN or of the tile before."""
    function, inputs = CASES[case]()
    in_schedule(0)
    expected = results_of(function, inputs)
    assert all(x.isfinite().all() for x in expected)
    for schedule in SCHEDULES:
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
def test_dynamic_shared_memory_is_what_the_file_says(kernels: ctypes.CDLL, source: str) -> None:
    """At shapes whose tiles are not cut short by the map, of the scales that losses have."""
    stated = re.search(
        r"^// Dynamic shared memory: at most (\d+) KiB", (build.CSRC / "cuda" / source).read_text(), re.M
    )
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            results_of(*pyramids((1, 64, 56, 56), dtype, layout))
    for width in (64, 128):
        results_of(*contrast(150, width, torch.bfloat16, "symmetric"))
    for launch in LAUNCHES[source]:
        used = kernels.lfcc_emulation_shared_bytes(launch.encode())
        assert 0 < used <= int(stated[1]) << 10 < 1.2 * used


def test_scales_that_the_kernels_do_not_take(in_schedule: Callable[[int], None]) -> None:
    with pytest.raises(RuntimeError, match=r"33 scales.* up to 32, use_backend\('triton'\) or use_backend\('eager'\)"):
        lk.lowpass(randn(1, 1, 40, 40), range(1, 34))
    with pytest.raises(RuntimeError, match=r"12000 filters need more shared memory.*use_backend\('eager'\)"):
        lk.lowpass(randn(1, 1, 12000, 12000).expand(1, 2, -1, -1), (12000,))


@pytest.mark.parametrize(
    ("tests", "chosen"),
    [
        ("emulation/test_kernels.py", "every_schedule"),
        ("test_lowpass.py", "cuda and not float64 and not float16"),
        ("test_lowpass_foreach.py", "cuda and not float64 and not float16"),
        ("test_info_nce.py", "cuda and not float64 and not float16"),
    ],
    ids=lambda value: value if value.endswith(".py") else "",
)
def test_under_sanitizers(tests: str, chosen: str) -> None:
    """Addresses, alignment, shifts, indices; a finding ends the process. In a shuffled schedule, and the grids of many
    shapes in two of the types, since all of it is slower."""
    if "LFCC_SANITIZED" in os.environ:
        pytest.skip("they are in this process")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen, tests]
    environment = os.environ | build.sanitizer_environment() | {"LFCC_SCHEDULE": "5"}
    ran = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
