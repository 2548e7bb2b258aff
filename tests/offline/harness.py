"""Compiles the Triton kernels without a GPU and prints their resource usage.

    python tests/offline/harness.py [--arch 80 90 100] [--only TEXT] [--json FILE]

The backend's own launchers run on fake CUDA tensors, with a stub as Triton's driver and every launch replaced by a
compilation. So the measured kernels are those of a real call, including specialisations. Every case runs in its own
process: caches of the launchers do not leak from one architecture into the next, and a crash of the compiler affects
only its case.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import DEVICES, Kernel, load, measure
from torch._subclasses import FakeTensor, FakeTensorMode

ROOT = Path(__file__).parents[2]
JOBS = 2
Case = Callable[[], object]


class StubDriver:
    """The part of a Triton driver that a launch uses before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.utils = SimpleNamespace(get_device_properties=lambda device: {
            "max_shared_mem": DEVICES[arch].shared_per_block, "multiprocessor_count": DEVICES[arch].multiprocessors,
            "max_num_regs": 65536, "warpSize": 32,
        })  # fmt: skip

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """Autotuning compiles every configuration without timing it."""
        return lambda call, quantiles=None, **_: (call(), [0.0] * len(quantiles or [0.5]))[1]

    def get_empty_cache_for_benchmark(self) -> None:
        return None

    def clear_cache(self, cache: None) -> None:
        return None


def _pretend_gpu(arch: int) -> None:
    """Make torch and Triton report a GPU of this architecture."""
    import triton

    limits, (major, minor) = DEVICES[arch], divmod(arch, 10)
    properties = SimpleNamespace(
        name=f"sm_{arch}", major=major, minor=minor, multi_processor_count=limits.multiprocessors,
        L2_cache_size=limits.l2_bytes, shared_memory_per_block_optin=limits.shared_per_block,
        max_threads_per_multi_processor=limits.max_threads, regs_per_multiprocessor=65536, warp_size=32,
    )  # fmt: skip
    triton.runtime.driver.set_active(StubDriver(arch))
    stubs: dict[str, Any] = {
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (major, minor),
        "current_device": lambda: 0,
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
        "is_current_stream_capturing": lambda: False,
        "device": lambda device: contextlib.nullcontext(),
    }
    for name, stub in stubs.items():
        setattr(torch.cuda, name, stub)
    # CUDA allocations are aligned, views may not be; Triton specialises on the address.
    FakeTensor.data_ptr = lambda self: (1 << 32) + self.storage_offset() * self.element_size()  # type: ignore


def _capture_launches(case: str, arch: int) -> list[Kernel]:
    """Replace launches by compilations from here on; the returned list collects their kernels."""
    from triton.runtime.jit import JITFunction

    kernels: list[Kernel] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        named = dict(zip(self.arg_names, args, strict=False)) | options
        kernel = Kernel(f"{self.module.rpartition('.')[2]}.{self.__name__}", [case], arch)
        kernels.append(kernel)
        constexprs = {param.name for param in self.params if param.is_constexpr}
        kernel.constexprs = {name: str(value) for name, value in named.items() if name in constexprs}
        try:
            kernel.grid = [int(size) for size in (grid(named) if callable(grid) else grid)]
            compiled = launch(self, *args, grid=grid, warmup=True, **options)
            measure(compiled, kernel)
            return compiled
        except Exception as error:
            kernel.error = _message(error)

    JITFunction.run = compile_only
    return kernels


def _message(error: BaseException) -> str:
    """The error and its cause, which has the reason of Triton's compilation errors."""
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    return "\n".join("".join(traceback.format_exception_only(cause)).strip() for cause in causes)


def _run_case(name: str, case: Case, arch: int, result: str) -> None:
    _pretend_gpu(arch)
    kernels = _capture_launches(name, arch)
    try:
        with FakeTensorMode():
            case()
    except Exception:
        kernels.append(Kernel("(launcher)", [name], arch, error=traceback.format_exc(limit=-3)))
    Path(result).write_text(json.dumps([asdict(kernel) for kernel in kernels]))


def _import_lazy_modules() -> None:
    from triton.runtime.cache import triton_key

    triton_key()  # a digest of Triton itself, which is cached
    with FakeTensorMode():
        torch.empty(2, device="cuda").to(torch.float16).contiguous()


def compile_cases(cases: dict[str, Case], archs: Iterable[int], jobs: int = JOBS) -> list[Kernel]:
    """Every kernel that the cases launch, once, with the names of the cases that share it."""
    fork = multiprocessing.get_context("fork")  # children share the imports
    _import_lazy_modules()
    tasks = [(name, case, arch) for name, case in cases.items() for arch in archs]
    kernels: dict[tuple[str, ...], Kernel] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / f"{n}.json") for n in range(len(tasks))]
        workers = [fork.Process(target=_run_case, args=(*task, path)) for task, path in zip(tasks, paths, strict=True)]
        running, waiting = [], workers[::-1]
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(waiting.pop())
                running[-1].start()
            wait([worker.sentinel for worker in running])
            running = [worker for worker in running if worker.is_alive()]
        for (name, _case, arch), worker, path in zip(tasks, workers, paths, strict=True):
            if worker.exitcode:
                crashed = Kernel("(process)", [name], arch, error=f"exited with code {worker.exitcode}")
                kernels[name, str(arch)] = crashed
                continue
            for kernel in load(Path(path).read_text()):
                key = (kernel.hash,) if kernel.hash else (name, str(arch), kernel.name, kernel.error)
                first = kernels.setdefault(key, kernel)
                if name not in first.cases:
                    first.cases.append(name)
    return list(kernels.values())


def table(kernels: list[Kernel]) -> str:
    """One line per kernel; accesses in bytes, narrowest and widest if they differ."""
    header = ["kernel", "case", "arch", "regs", "spills", "smem", "warps", "stages", "occupancy"]
    header += ["blocks", "dots", "mma", "ld", "st"]
    rows = [header]
    for k in sorted(kernels, key=lambda k: (k.name, k.cases, k.arch)):
        row = [k.name, k.case, f"sm_{k.arch}"]
        if k.error:
            rows.append([*row, "FAILED: " + k.error.splitlines()[-1][:120]])
            continue
        mma = " ".join(f"{kind}:{count}" for kind, count in k.mma.items())
        blocks = " ".join(n.removeprefix("BLOCK_") + size for n, size in k.constexprs.items() if n.startswith("BLOCK_"))
        spills = str(k.spills) + (f" (stack {k.stack})" if k.stack else "")
        rows.append([
            *row, str(k.registers), spills, f"{k.shared / 1024:.0f}K", str(k.warps), str(k.stages),
            f"{k.occupancy:.0%}", blocks, ",".join(k.dots), mma, k.widths("ld"), k.widths("st"),
        ])  # fmt: skip
    sizes = [max(len(row[n]) for row in rows if n < len(row) and len(row) > 4) for n in range(len(header))]
    lines = ("  ".join(text.ljust(size) for text, size in zip(row, sizes, strict=False)).rstrip() for row in rows)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(DEVICES), choices=list(DEVICES))
    parser.add_argument("--only", default="", help="compile only cases whose name contains this text")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()

    # Both are read when the modules of the kernels are imported.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton-cache"))
    sys.path.append(str(ROOT))  # in case the package is not installed
    import triton
    from cases import CASES

    kernels = compile_cases({name: case for name, case in CASES.items() if options.only in name}, options.arch)
    if options.json:
        options.json.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=1))
    print(f"Triton {triton.__version__}, {len(kernels)} kernels\n{table(kernels)}")
    return 1 if any(kernel.error for kernel in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
