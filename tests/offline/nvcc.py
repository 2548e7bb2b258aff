"""Compiles the files in csrc/cuda with nvcc and reads ptxas's report and the PTX of every kernel.

No GPU is needed. Reports are cached in build/nvcc until a source, the compiler or its options change.
"""

import hashlib
import os
import re
import runpy
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = {80, 90, 100}
TABLES_OF = "13.0"  # the nvcc of the resource tables in the sources; register allocation differs between versions
_BUILD = runpy.run_path(str(ROOT / "setup.py"))
_KEPT = ROOT / "build/nvcc"


@dataclass(frozen=True)
class CudaKernel:
    """A __global__ function, or one instantiation of a template, on one architecture."""

    signature: str
    arch: int
    registers: int
    stack: int  # bytes, for arrays in local memory and spilled registers
    spills: int  # bytes stored and loaded
    shared: int  # bytes of static shared memory
    ptx: str

    @property
    def name(self) -> str:
        return re.split(r"[<(]", self.signature)[0]


def find_cuda() -> tuple[Any, str]:
    """The toolkit that setup.py finds, with all architectures, or None and the reason."""
    try:
        cuda = _BUILD["find_toolkit"](f"{TABLES_OF} or newer")
        with patch.dict(os.environ, TORCH_CUDA_ARCH_LIST=""):
            cuda.architectures = _BUILD["find_architectures"](cuda)
    except _BUILD["NoCuda"] as missing:
        return None, missing.args[0]
    return (cuda, "") if shutil.which("c++filt") else (None, "c++filt (binutils) is not installed")


def compile_kernels(source: Path, cuda: Any) -> list[CudaKernel]:
    """All kernels of a file on all architectures; RuntimeError with nvcc's output if it does not compile."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    options = [*COMMON_NVCC_FLAGS, *_BUILD["NVCC_FLAGS"], *cuda.architectures, f"-I{ROOT / 'csrc'}"]
    # C++17 as with torch 2.11; builds with a newer torch test C++20.
    options += ["-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v"]
    headers = sorted(path for end in ("*.h", "cuda/*.h", "cuda/*.cuh") for path in (ROOT / "csrc").glob(end))
    key = "\0".join([cuda.version, *options, *(path.read_text() for path in [source, *headers])])
    kept = _KEPT / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()}"
    if not kept.exists():
        _compile([f"{cuda.home}/bin/nvcc", *options, "-fatbin", str(source)], source, kept)
    ptx = {path.stem: path.read_text() for path in kept.glob("*.ptx")}
    # Architectures may share the PTX of the oldest.
    virtual = {arch: name for name, arch in re.findall(r"arch=(\w+),code=sm_(\d+)", " ".join(cuda.architectures))}
    return _read((kept / "report").read_text(), {arch: ptx[name] for arch, name in virtual.items()})


def stated(source: Path) -> dict[str, tuple[int, int]]:
    """Registers and bytes of static shared memory per kernel, from the comment at the head of a file."""
    lines = re.findall(
        r"^//\s+(\w+)\s+(\d+) registers\s+(\d+) bytes of static shared memory$", source.read_text(), re.MULTILINE
    )
    return {name: (int(registers), int(shared)) for name, registers, shared in lines}


def measured(kernels: Iterable[CudaKernel]) -> dict[str, tuple[int, int]]:
    """The same from the compiler, the maximum over architectures and instantiations."""
    most: dict[str, tuple[int, int]] = {}
    for kernel in kernels:
        registers, shared = most.get(kernel.name, (0, 0))
        most[kernel.name] = max(registers, kernel.registers), max(shared, kernel.shared)
    return most


def _compile(command: list[str], source: Path, kept: Path) -> None:
    """Write ptxas's report and the PTX of every virtual architecture to the directory `kept`, and delete older ones."""
    _KEPT.mkdir(parents=True, exist_ok=True)
    for old in _KEPT.glob(f"{source.stem}-*"):
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=_KEPT) as name:
        folder = Path(name)
        run = subprocess.run(
            [*command, "--keep", "--keep-dir", name, "-o", f"{name}/kernels.fatbin"],
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise RuntimeError(f"nvcc on {source.name}:\n{run.stdout}{run.stderr}")
        (folder / "kept").mkdir()
        (folder / "kept/report").write_text(run.stderr)
        for ptx in folder.glob("*.ptx"):
            ptx.rename(folder / "kept" / ptx.name.removeprefix(f"{source.stem}."))
        if not kept.exists():  # another process may have been faster
            (folder / "kept").rename(kept)


def _read(report: str, ptx: dict[str, str]) -> list[CudaKernel]:
    """Parse the report, one chunk per kernel, which includes the functions it calls that were not inlined."""
    bodies = {
        arch: dict(re.findall(r"^\S*\s*\.entry (\w+)\(\n(.*?)^}", text, re.MULTILINE | re.DOTALL))
        for arch, text in ptx.items()
    }
    chunks = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'(.*?)(?=Compiling entry function|\Z)", report, re.DOTALL
    )
    signatures = _demangle([mangled for mangled, _, _ in chunks])
    kernels = [
        CudaKernel(
            signature=signature,
            arch=int(arch),
            registers=_sum(r"Used (\d+) registers", chunk),
            stack=_sum(r"(\d+) bytes stack frame", chunk),
            spills=_sum(r"(\d+) bytes spill", chunk),
            shared=_sum(r"(\d+) bytes smem", chunk),
            ptx=bodies[arch][mangled],
        )
        for signature, (mangled, arch, chunk) in zip(signatures, chunks, strict=True)
    ]
    return sorted(kernels, key=lambda kernel: (kernel.signature, kernel.arch))


def _sum(pattern: str, text: str) -> int:
    return sum(map(int, re.findall(pattern, text)))


def _demangle(names: list[str]) -> list[str]:
    """Signatures such as "forward_kernel<float>(Problems)"."""
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"^void |lfcc::cuda::|\(anonymous namespace\)::", "", line) for line in run.stdout.splitlines()]
