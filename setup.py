"""Builds the two compiled parts of the package; everything else is in pyproject.toml.

`lfcc_kernels._C`     the kernels, on libtorch's stable ABI: one file serves torch 2.11 to 2.14, any Python.
`lfcc_kernels._host`  facts about the build and this CPU, with pybind11 and no torch header, for one Python.

Without a C++ compiler neither is built, the package installs all the same and runs on the `eager` backend.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

# No -march: csrc/cpu/clones.h compiles functions for several CPU levels, and the loader picks one. The two
# -fno flags let loops with exp and comparisons vectorise; unlike -ffast-math they keep NaN and infinity.
CXX_FLAGS = [
    *("-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    *("-fvisibility=hidden", "-Wall", "-Wno-psabi"),
]
CSRC = os.path.abspath("csrc")  # absolute, because ninja runs in another folder
COMMON = {
    "depends": sorted(glob("csrc/**/*.h", recursive=True)),
    "extra_compile_args": CXX_FLAGS,
    "extra_link_args": ["-fopenmp"],
}


def check_cuda_switch() -> None:
    switch = os.environ.get("LFCC_BUILD_CUDA", "auto")
    if switch == "1":
        raise SystemExit("LFCC_BUILD_CUDA=1: this version has no CUDA kernels to build; use 0 or auto")
    if switch not in ("0", "auto"):
        raise SystemExit(f"LFCC_BUILD_CUDA={switch}: expected 0, 1 or auto")


def find_compiler() -> str | None:
    compiler = os.environ.get("CXX", "c++")
    return shutil.which(compiler.split()[0]) and compiler


def kernels() -> Extension:
    from torch.utils.cpp_extension import CppExtension

    oldest_torch = "0x020b000000000000"  # 2.11
    extension = CppExtension(
        "lfcc_kernels._C",
        ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        include_dirs=[CSRC],
        define_macros=[("TORCH_TARGET_VERSION", oldest_torch)],
        py_limited_api=True,
        **COMMON,
    )
    extension.libraries.remove("c10")  # not part of the stable ABI
    return extension


def host(compiler: str) -> Extension:
    import pybind11
    import torch

    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout
    facts = {
        "LFCC_COMPILER": version.splitlines()[0],
        "LFCC_FLAGS": " ".join(CXX_FLAGS),
        "LFCC_BUILD_TORCH": torch.__version__,
        "LFCC_BUILD_MACHINE": platform.machine(),
    }
    return Extension(
        "lfcc_kernels._host",
        ["csrc/host.cpp"],
        include_dirs=[CSRC, pybind11.get_include()],
        define_macros=[(name, f'"{value}"') for name, value in facts.items()],
        language="c++",
        **COMMON,
    )


def extensions() -> dict:
    compiler = find_compiler()
    if compiler is None:
        print(
            "lfcc_kernels: no C++ compiler found, installing without compiled kernels (eager backend only); "
            "install g++ 12 or newer, or set CXX, and install again",
            file=sys.stderr,
        )
        return {}
    from torch.utils.cpp_extension import BuildExtension

    class IncrementalBuild(BuildExtension):
        """Keeps the objects, so that ninja compiles only what changed; pip names a new folder every time."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = f"build/objects-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

    modules = [kernels()]
    if Path(sysconfig.get_path("include"), "Python.h").exists():
        modules.append(host(compiler))
    else:
        print(
            "lfcc_kernels: no Python.h found (Debian, Ubuntu: python3-dev), installing without "
            "lfcc_kernels._host, which no kernel needs",
            file=sys.stderr,
        )
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": IncrementalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


check_cuda_switch()
setup(**extensions())
