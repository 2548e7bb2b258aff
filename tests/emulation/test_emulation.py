"""The emulation itself: kernels whose results are known, and planted faults that it must find (faults.cu)."""

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from emulation import build
from torch import Tensor

SOURCE = Path(__file__).with_name("faults.cu")
FAULTS = re.findall(r"\w+", re.search(r"enum Fault \{(.*?)\}", SOURCE.read_text(), re.S)[1])
SCHEDULES = range(6)
TYPES = {"float32": 1, "bfloat16": 2, "float16": 3}


class Kernels:
    """Calls the functions of faults.cu, with tensors as pointers and faults by name; raises their errors."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(build.build("faults", [SOURCE])))

    def __call__(self, name: str, *arguments: Tensor | int | str) -> None:
        function = getattr(self.library, name)
        function.restype = None if name.endswith("_all") else ctypes.c_char_p
        message = function(*map(_argument, arguments))
        if message:
            raise RuntimeError(message.decode())


def _argument(value: Tensor | int | str) -> object:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, str):
        return ctypes.c_int(FAULTS.index(value))
    return ctypes.c_int64(value)


@pytest.fixture(scope="session")
def loaded() -> Kernels:
    return Kernels()


@pytest.fixture
def call(loaded: Kernels) -> Iterator[Kernels]:
    yield loaded
    loaded("lfcc_emulation_schedule", 0)


def in_all_schedules(call: Kernels, name: str, x: Tensor, result: Tensor, *arguments: int | str) -> list[Tensor]:
    results = []
    for schedule in SCHEDULES:
        call("lfcc_emulation_schedule", schedule)
        result.fill_(123)
        call(name, x, result, *arguments)
        results.append(result.clone())
    return results


def all_same(results: list[Tensor]) -> bool:
    return all(torch.equal(each, results[0]) for each in results)  # False if there is a NaN


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_sum_with_wide_loads_shuffles_and_static_shared_memory(call: Kernels, threads: int) -> None:
    x = torch.randn(4 * 3001)
    results = in_all_schedules(call, "block_sum", x, torch.empty(5), 3001, 5, threads)
    assert all_same(results)
    torch.testing.assert_close(results[0].sum(), x.sum())


def test_log_sum_exp_with_dynamic_shared_memory(call: Kernels) -> None:
    x = torch.randn(9, 300)
    results = in_all_schedules(call, "row_lse", x, torch.empty(9), 9, 300, "none")
    assert all_same(results)
    torch.testing.assert_close(results[0], x.logsumexp(1))


def test_warp_reverses_numbers(call: Kernels) -> None:
    x = torch.randn(2, 32)
    results = in_all_schedules(call, "turn", x, torch.empty(2, 32), "none")
    assert all(torch.equal(each, x.flip(1)) for each in results)


def test_copies_in_two_stages(call: Kernels) -> None:
    x = torch.randn(7, 64, 4)
    results = in_all_schedules(call, "staged_sum", x, torch.empty(64), 7, "none")
    assert all_same(results)
    torch.testing.assert_close(results[0], x.sum((0, 2)))


def test_exchanges_between_lanes(call: Kernels) -> None:
    x, results = torch.randn(32), torch.empty(32, 12)
    call("exchange", x, results)
    lane = torch.arange(32)
    sources = [
        *(torch.full((32,), 5), lane // 8 * 8 + (lane + 3) % 8, lane ^ 3, torch.where(lane < 16, lane, lane - 16)),
        *(torch.where(lane < 25, lane + 7, lane), torch.where(lane % 8 < 5, lane + 3, lane)),
        *(torch.where(lane >= 7, lane - 7, lane), torch.where(lane % 8 >= 3, lane - 3, lane)),
    ]
    for k, source in enumerate(sources):
        assert torch.equal(results[:, k], x[source]), k
    votes = ((x > 0).view(2, 16) * 2 ** torch.arange(16)).sum(1).repeat_interleave(16)
    upper = lane >= 16
    others = torch.stack([votes, upper, ~upper, x[lane // 16 * 16]], 1)
    assert torch.equal(results[:, 8:], others)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_from_shared_memory(call: Kernels, transposed: bool) -> None:
    rows = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    result = torch.empty(32, 4, dtype=torch.int32)
    call("matrices", rows, result, transposed)
    expected = rows.mT.contiguous() if transposed else rows
    assert torch.equal(result, expected.view(torch.int32).view(4, 32).T)


@pytest.mark.parametrize("dtype", TYPES)
def test_products_of_matrices(call: Kernels, dtype: str) -> None:
    depth = 8 if dtype == "float32" else 16
    a, b, c = torch.randint(-8, 9, (16, depth)), torch.randint(-8, 9, (depth, 8)), torch.randint(-8, 9, (16, 8))
    result = c.float()
    call("product", a.to(getattr(torch, dtype)), b.to(getattr(torch, dtype)), result, TYPES[dtype])
    assert torch.equal(result, (c + a @ b).float())  # small integers: exact


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_conversions_of_two_byte_numbers(call: Kernels, dtype: str) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(getattr(torch, dtype))
    wide = torch.empty(2**16)
    call("widen_all", numbers, wide, 2**16, TYPES[dtype])
    assert same_numbers(wide, numbers.float())

    # Every number, the midpoints between neighbours, the numbers next to these, and random numbers.
    between = wide.view(2, -1)[:, :-1] / 2 + wide.view(2, -1)[:, 1:] / 2
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    points = torch.cat([wide, between.flatten(), torch.nextafter(between, up).flatten()])
    points = torch.cat([points, torch.nextafter(between, down).flatten(), any_float32()])
    narrowed = torch.empty_like(points, dtype=numbers.dtype)
    call("narrow_all", points, narrowed, len(points), TYPES[dtype])
    assert same_numbers(narrowed, points.to(numbers.dtype))


def any_float32() -> Tensor:
    return torch.randint(-(2**31), 2**31, (2**20,)).int().view(torch.float32)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    integer = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.isnan(), b.isnan()) and bool(((a.view(integer) == b.view(integer)) | a.isnan()).all())


@pytest.mark.parametrize("kernel, fault", [
    ("row_lse", "no_barrier"), ("turn", "no_warp_barrier"), ("staged_sum", "no_wait"), ("staged_sum", "weak_wait"),
])  # fmt: skip
def test_missing_synchronisation_shows_in_some_schedule(call: Kernels, kernel: str, fault: str) -> None:
    arguments = {"row_lse": (1, 256), "turn": (), "staged_sum": (1,)}[kernel]
    assert not all_same(in_all_schedules(call, kernel, torch.randn(256), torch.empty(64), *arguments, fault))


def test_shared_memory_is_nan_until_it_is_written(call: Kernels) -> None:
    result = torch.zeros(3, 2, 64)
    with ThreadPoolExecutor(2) as pool:  # threads of the process have separate static shared memory
        for _ in pool.map(lambda block: call("unwritten", result[block], 1), range(3)):
            pass
    assert result.isnan().all()


@pytest.mark.parametrize("fault, threads, message", [
    ("divergent_barrier", 64, r"deadlock, 16 threads in __ballot_sync of line \d+, 48 threads in __syncthreads of"),
    ("two_barriers", 64, r"__syncthreads of line \d+, where others wait in that of line \d+"),
    ("two_operations", 32, r"__\w+_sync of line \d+, where other lanes wait in __\w+_sync"),
    ("lane_missing", 64, r"deadlock, 31 threads in __shfl_sync of line \d+, 33 threads in the end"),
    ("lane_not_in_mask", 32, r"__shfl_sync of line \d+ with mask 0xff, which leaves it out"),
    ("misaligned_matrix", 32, r"load_matrices of line \d+: 0x\w+ is not 16 aligned bytes of shared memory"),
    ("half_a_warp", 48, r"load_matrices of line \d+ in a warp of less than 32 lanes"),
])  # fmt: skip
def test_misuse_raises(call: Kernels, fault: str, threads: int, message: str) -> None:
    for schedule in SCHEDULES:
        call("lfcc_emulation_schedule", schedule)
        with pytest.raises(RuntimeError, match=rf"stuck, block \([01], 0, 0\), schedule {schedule}: .*{message}"):
            call("stuck", torch.empty(64), threads, fault)
    test_log_sum_exp_with_dynamic_shared_memory(call)  # works afterwards


@pytest.mark.parametrize("fault, message", [
    ("never_waited", "1 asynchronous copies were not waited for"),
    ("misaligned_copy", r"copy_async_16 of line \d+: 0x\w+ is not as many aligned bytes of shared memory"),
    ("copy_from_shared", r"copy_async_16 of line \d+: 0x\w+ is not as many aligned bytes of global memory"),
])  # fmt: skip
def test_misused_copy_raises(call: Kernels, fault: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call("staged_sum", torch.randn(256), torch.empty(64), 1, fault)


@pytest.mark.parametrize("threads, shared_bytes, blocks, message", [
    (1025, 0, 1, "invalid configuration"), (0, 0, 1, "invalid configuration"), (32, 0, 65536, "invalid configuration"),
    (32, (227 << 10) + 1, 1, "232449 bytes of dynamic shared memory"),
])  # fmt: skip
def test_launch_beyond_the_limits_raises(
    call: Kernels, threads: int, shared_bytes: int, blocks: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        call("oversized", threads, shared_bytes, blocks)


def test_largest_shared_memory_is_recorded(call: Kernels) -> None:
    shared_bytes = call.library.lfcc_emulation_shared_bytes
    shared_bytes.restype = ctypes.c_size_t
    for width in (200, 300, 100):
        call("row_lse", torch.randn(1, width), torch.empty(1), 1, width, "none")
    assert shared_bytes(b"row_lse") == 1200
    assert shared_bytes(b"row_lse") == 0  # not launched since


UNDER_SANITIZERS = """
import ctypes, sys
kernels = ctypes.CDLL(sys.argv[1])
x, result, fault = (ctypes.c_float * 4096)(), (ctypes.c_float * 4096)(), int(sys.argv[3])
address = ctypes.addressof(x)
for schedule in range(3):
    kernels.lfcc_emulation_schedule(schedule)
    for kind in range(fault, -1, -max(fault, 1)):  # first the fault, then none
        if sys.argv[2] == "stuck": kernels.stuck(result, 64, kind)
    if sys.argv[2] == "row_lse": kernels.row_lse(x, result, 3, 100, fault)
    if sys.argv[2] == "past": kernels.block_sum(x, result, ctypes.c_int64(1025), 2, 64)
    if sys.argv[2] == "misaligned": kernels.block_sum(ctypes.c_void_p(address + 4), result, ctypes.c_int64(1000), 2, 64)
"""


@pytest.mark.parametrize("kernel, fault, found", [
    ("row_lse", "none", None), ("stuck", "divergent_barrier", None),
    ("row_lse", "past_shared", r"heap-buffer-overflow.*READ of size 4.*row_lse_kernel.*faults.cu"),
    ("past", "none", r"heap-buffer-overflow.*READ of size .*block_sum_kernel.*faults.cu"),
    ("misaligned", "none", r"misaligned address.*requires 16 byte alignment.*block_sum_kernel"),
])  # fmt: skip
def test_sanitizers_check_kernels(kernel: str, fault: str, found: str | None) -> None:
    library = build.build("faults", [SOURCE], sanitize=True)
    ran = subprocess.run(
        [sys.executable, "-c", UNDER_SANITIZERS, library, kernel, str(FAULTS.index(fault))],
        env=os.environ | build.sanitizer_environment(), capture_output=True, text=True,
    )  # fmt: skip
    if found is None:
        assert (ran.returncode, ran.stderr) == (0, "")
    else:
        assert ran.returncode
        assert re.search(found, ran.stderr, re.S), ran.stderr
