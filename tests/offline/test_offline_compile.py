"""Every Triton kernel compiles for three architectures, within their limits."""

import importlib.util
from collections.abc import Iterable

import pytest
from measure import DEVICES, Kernel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def assert_none(wrong: Iterable[tuple[Kernel, str]]) -> None:
    """Fail with one line per entry; pytest would truncate a long list."""
    lines = [f"{kernel.name}, {kernel.case}, sm_{kernel.arch}: {what}" for kernel, what in wrong]
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


def of_claim(kernels: list[Kernel], name: str, case: str) -> list[Kernel]:
    found = [k for k in kernels if k.name == name and any(case in each for each in k.cases)]
    assert found, f"no {name} in a case {case}"
    return found


def test_every_launch_compiles(launches: list[Kernel]) -> None:
    assert launches
    assert_none((k, k.error) for k in launches if k.error)


def test_no_spills_and_no_local_memory(kernels: list[Kernel]) -> None:
    assert_none((k, f"{k.spills} B spilled, {k.stack} B of stack") for k in kernels if k.spills or k.stack)


def test_blocks_fit_a_multiprocessor(kernels: list[Kernel]) -> None:
    assert_none((k, f"{k.shared} B shared") for k in kernels if k.shared > DEVICES[k.arch].shared_per_block)
    assert_none((k, f"{k.registers} registers x {k.warps} warps") for k in kernels if not k.occupancy)


def test_grids_are_within_limits(kernels: list[Kernel]) -> None:
    assert_none((k, str(k.grid)) for k in kernels if k.grid[0] >= 1 << 31 or max(k.grid[1:], default=1) > 65535)


def test_products_are_on_tensor_cores(kernels: list[Kernel]) -> None:
    """Except IEEE float32, which tensor cores do not support, and float64 on sm_100 with Triton 3.6."""
    assert_none((k, str(k.dots)) for k in kernels if set(k.dots) - {"f32 ieee", "f64"} and not k.mma)


def test_16_bit_products_use_warp_groups_on_sm_90(kernels: list[Kernel]) -> None:
    from cases import WGMMA

    on_sm_90 = [k for k in kernels if k.arch == 90 and k.two_byte_dots]
    claimed = [k for claim in WGMMA for k in of_claim(on_sm_90, *claim)]
    assert_none((k, str(k.mma)) for k in claimed if "wgmma" not in k.mma)


def test_claimed_accesses_are_16_bytes_wide(kernels: list[Kernel]) -> None:
    from cases import WIDE

    wrong = []
    for name, case, source in WIDE:
        for kernel in of_claim(kernels, name, case):
            widths = sorted({access.width for access in kernel.accesses if source in access.source})
            if not widths or widths[0] < 16:
                wrong.append((kernel, f"{source} {widths} bytes"))
    assert_none(wrong)
