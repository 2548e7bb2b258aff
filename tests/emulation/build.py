"""Compiles the CUDA kernels for the CPU, with tests/emulation/cuda_emulation.h in place of CUDA.

    python tests/emulation/build.py [--sanitize]

Objects and libraries are in build/emulation under names with a digest of everything they depend on, so nothing is
compiled twice. Concurrent processes wait for the first one.
"""

import argparse
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CSRC, EMULATION, OUTPUT = ROOT / "csrc", ROOT / "tests" / "emulation", ROOT / "build" / "emulation"
TORCH = Path(torch.__file__).parent
COMPILER = os.environ.get("CXX", "c++").split()
JOBS = 2
# Memory on a GPU is untyped: kernels access floats as integers and vice versa, hence no strict aliasing. Products are
# rounded before they are added (no contraction), as __fmul_rn requires; kernels must not depend on either.
FLAGS = [
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-fno-math-errno"),
    *("-ffp-contract=off", "-fmax-errors=5"),
    *("-DLFCC_FUSED_FEWEST_ROWS=64", "-DLFCC_CHUNK_BYTES=20000"),  # small tests run every algorithm
    *("-DLFCC_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{CSRC}", f"-I{EMULATION}"),
]
PLAIN = ["-O2", "-g0"]
SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def library(sanitize: bool = False) -> Path:
    """The kernels of csrc/cuda with their bindings, as torch operators on CPU tensors."""
    cuda = CSRC / "cuda"
    return build("kernels", [*sorted(cuda.glob("*.cu")), *sorted(cuda.glob("bindings*.cpp"))], sanitize)


def load() -> None:
    """Register the operators in this process if there are a compiler and the sources; the sanitized ones if the process
    runs in the `sanitizer_environment`."""
    if not shutil.which(COMPILER[0]) or not CSRC.exists():
        return
    path = library(sanitize="LFCC_SANITIZED" in os.environ)
    torch.ops.load_library(str(path))
    if schedule := os.environ.get("LFCC_SCHEDULE"):
        ctypes.CDLL(str(path)).lfcc_emulation_schedule(int(schedule))


def build(name: str, sources: Sequence[Path], sanitize: bool = False) -> Path:
    """Build a library from these sources. With `sanitize`, loading it requires the `sanitizer_environment`."""
    flags = [*FLAGS, *(SANITIZED if sanitize else PLAIN)]
    common = [_compiler(), torch.__version__, *flags]
    included = [path for folder in (CSRC, EMULATION) for end in ("*.h", "*.cuh") for path in sorted(folder.rglob(end))]
    common += [path.read_text() for path in included]
    bindings = [source for source in sources if source.suffix == ".cpp"]  # the only files that include torch
    objects = {OUTPUT / f"{s.stem}-{_digest(*common, s.name, s.read_text())}.o": s for s in sources}
    result = OUTPUT / f"{name}-{_digest(*map(str, objects))}.so"
    if result.exists():
        return result

    def compile_object(target: Path) -> None:
        source = objects[target]
        headers = ["-isystem", str(TORCH / "include")] if source in bindings else []
        _run([*COMPILER, *flags, *headers, "-c", "-x", "c++", str(source)], target)

    OUTPUT.mkdir(parents=True, exist_ok=True)
    with open(OUTPUT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(compile_object, [target for target in objects if not target.exists()]))
        if not result.exists():
            libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu"] if bindings else []
            _run([*COMPILER, *flags, "-shared", *map(str, objects), *libraries], result)
    return result


def sanitizer_environment() -> dict[str, str]:
    """Environment variables of a process that loads a library built with `sanitize`.

    Python is not built with the sanitizer, so its runtime must be preloaded, together with the C++ library, without
    which torch's exceptions would not be caught. Python does not free all memory, so leaks are not reported, and the
    quarantine of freed memory is small.
    """
    libraries = [_output([*COMPILER, f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libstdc++.so")]
    return {
        "LFCC_SANITIZED": "1",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=16:malloc_context_size=5",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _run(command: list[str], target: Path) -> None:
    """Write the target atomically, for concurrent processes."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    _output([*command, "-o", str(temporary)])
    temporary.replace(target)


@cache
def _compiler() -> str:
    return _output([*COMPILER, "--version"])


def _output(command: list[str]) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # of the sanitizer
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{ran.stdout}{ran.stderr}")
    return ran.stdout


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true", help="with the address and undefined-behaviour sanitizers")
    sanitize = parser.parse_args().sanitize
    print(library(sanitize) if shutil.which(COMPILER[0]) else f"no C++ compiler {COMPILER[0]}: nothing is compiled")
