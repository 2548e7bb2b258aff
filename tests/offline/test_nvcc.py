"""Every CUDA kernel compiles for three architectures, with the resources stated in the head of its file."""

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from nvcc import ARCHITECTURES, SOURCES, TABLES_OF, CudaKernel, compile_kernels, find_cuda, measured, stated

CUDA, WHY_NOT = find_cuda()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CUDA is None, reason=WHY_NOT)]

# Instructions in PTX. Accesses of 16 bytes:
LOAD = r"\bld\.global(\.\w+)*\.v(4\.[a-z]+32|2\.[a-z]+64)\b"
STORE = r"\bst\.global(\.\w+)*\.v(4\.[a-z]+32|2\.[a-z]+64)\b"
COPY = r"\bcp\.async\.cg\.shared\.global [^;]*, 16;"
MATRICES = r"\bldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16\b"
TRANSPOSED = r"\bldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16\b"
MMA = r"\bmma\.sync\.aligned\.{}\.row\.col\.f32\.{}\.f32\b"

# Per file: instructions that every kernel must have whose signature begins like this.
CLAIMS: dict[str, list[tuple[str, list[str]]]] = {
    "info_nce_chunk_gradient.cu": [("gradient_kernel<.*true>", [LOAD]), ("gradient_kernel<float.*true>", [STORE])],
    "info_nce_chunks.cu": [("softmax_kernel<.*true>", [LOAD]), ("softmax_kernel<float.*true>", [STORE])],
    "info_nce_fused.cu": [
        ("one_pass_kernel<", [COPY, MATRICES]),
        ("one_pass_kernel<RowTiles<__nv_bfloat16", [MMA.format("m16n8k16", "bf16.bf16")]),
        ("one_pass_kernel<RowTiles<__half", [MMA.format("m16n8k16", "f16.f16")]),
        ("one_pass_kernel<RowTiles<float", [MMA.format("m16n8k8", "tf32.tf32")]),
        ("gradient_kernel<", [COPY, MATRICES]),
        ("gradient_kernel<RowTiles<__nv_bfloat16", [MMA.format("m16n8k16", "bf16.bf16"), TRANSPOSED]),
        ("gradient_kernel<RowTiles<__half", [MMA.format("m16n8k16", "f16.f16"), TRANSPOSED]),
        ("gradient_kernel<RowTiles<float", [MMA.format("m16n8k8", "tf32.tf32")]),
    ],
    "info_nce_merge.cu": [("merge_kernel<", [LOAD, STORE])],
    "info_nce_rows.cu": [("pack_kernel<", [LOAD, STORE]), ("epilogue_kernel<", [LOAD, STORE])],
    "lowpass_filter_grad.cu": [("filter_grad_kernel<", [COPY])],
    "lowpass_forward.cu": [("forward_kernel<", [COPY])],
    "lowpass_input_grad.cu": [("input_grad_kernel<", [STORE])],
}


@pytest.fixture(scope="module", params=SOURCES, ids=lambda source: source.name)
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[Path, Future]]:
    """All files at once, one per core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {source: pool.submit(compile_kernels, source, CUDA) for source in SOURCES}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def kernels(source: Path, compiled: dict[Path, Future], cuda_table: list[str]) -> list[CudaKernel]:
    """The kernels of one file on all architectures."""
    try:
        kernels = compiled[source].result()
    except RuntimeError as error:
        pytest.fail(str(error), pytrace=False)
    cuda_table.extend(rows(source, kernels))
    return kernels


def rows(source: Path, kernels: list[CudaKernel]) -> list[str]:
    """Lines of a table: per kernel the registers of its instantiations by architecture, and shared memory."""
    lines = []
    for name, (_, shared) in measured(kernels).items():
        own = [kernel for kernel in kernels if kernel.name == name]
        used = {arch: [k.registers for k in own if k.arch == arch] for arch in sorted({k.arch for k in own})}
        registers = "   ".join(f"sm_{arch} {min(used[arch]):>3} to {max(used[arch]):>3}" for arch in used)
        lines.append(f"{source.name:<26} {name:<24} x {len(own) // len(used):<3} {registers}   {shared:>6} B")
    return lines


def assert_none(wrong: list[str]) -> None:
    """Fail with one line per entry; pytest would truncate a long list."""
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def test_no_spills_and_no_local_memory(kernels: list[CudaKernel]) -> None:
    assert {kernel.arch for kernel in kernels} == ARCHITECTURES
    assert_none(
        [
            f"{k.signature}, sm_{k.arch}: {k.spills} B spilled, {k.stack} B of stack"
            for k in kernels
            if k.spills or k.stack
        ]
    )


@pytest.mark.skipif(CUDA is not None and CUDA.version != TABLES_OF, reason=f"tables are of nvcc {TABLES_OF}")
def test_resources_are_those_in_the_head_of_the_file(source: Path, kernels: list[CudaKernel]) -> None:
    """Shared memory to the byte, registers at most eight fewer: ptxas grants them in eights."""
    given, needed = stated(source), measured(kernels)
    wrong = [
        name
        for name in given.keys() | needed.keys()
        if name not in given
        or name not in needed
        or not 0 <= given[name][0] - needed[name][0] <= 8
        or given[name][1] != needed[name][1]
    ]
    if wrong:
        width = max(map(len, needed))
        lines = (
            f"//   {name:<{width}}   {registers} registers   {shared} bytes of static shared memory"
            for name, (registers, shared) in needed.items()
        )
        pytest.fail(f"of {', '.join(sorted(wrong))}; measured:\n" + "\n".join(lines), pytrace=False)


def test_instructions_are_as_claimed(source: Path, kernels: list[CudaKernel]) -> None:
    wrong = []
    for beginning, patterns in CLAIMS[source.name]:
        claimed = [kernel for kernel in kernels if re.match(beginning, kernel.signature)]
        if not claimed:
            wrong.append(f"no kernel {beginning}...")
        wrong += [
            f"{kernel.signature}, sm_{kernel.arch}: no {pattern}"
            for kernel in claimed
            for pattern in patterns
            if not re.search(pattern, kernel.ptx)
        ]
    assert_none(wrong)
