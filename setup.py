"""Builds the two compiled modules of the package; everything else is in pyproject.toml.

`lfcc_kernels._C`     the kernels, on libtorch's stable ABI: one file for torch 2.11 to 2.14 and every Python.
`lfcc_kernels._host`  facts about the build and the CPU, with pybind11 and without torch headers, for one Python.

Without a C++ compiler neither is built, and the package runs on the `eager` backend. `_C` contains CUDA kernels if a
CUDA toolkit and a torch with CUDA are found. LFCC_BUILD_CUDA=1 makes the build fail with a reason if the CUDA kernels
cannot be built, and builds them with a CPU-only torch, too; LFCC_BUILD_CUDA=0 disables them.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

# No -march: csrc/cpu/clones.h compiles functions for several CPU levels, and the loader selects one. The two
# -fno flags let loops with exp and comparisons vectorise; unlike -ffast-math they respect NaN and infinity.
CXX_FLAGS = [
    *("-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    *("-fvisibility=hidden", "-Wall", "-Wno-psabi"),
]
NVCC_FLAGS = ["-O3", "-Xcompiler", "-fvisibility=hidden", "--threads", "2"]
ARCHITECTURES = "8.0;9.0;10.0+PTX"  # unless TORCH_CUDA_ARCH_LIST is set
TOOLKITS = ["/usr/local/cuda"]  # searched after CUDA_HOME, CUDA_PATH and PATH
CSRC = os.path.abspath("csrc")  # absolute, because ninja runs in another directory
HEADERS = sorted([*glob("csrc/**/*.h", recursive=True), *glob("csrc/cuda/*.cuh")])
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu"))


def warn(notice: str) -> None:
    print(f"lfcc_kernels: {notice}", file=sys.stderr)


def find_compiler() -> str | None:
    compiler = os.environ.get("CXX", "c++")
    return shutil.which(compiler.split()[0]) and compiler


@dataclass
class Cuda:
    """A CUDA toolkit and the targets of its nvcc."""

    home: str
    headers: str
    archives: str
    version: str
    architectures: list[str] = field(default_factory=list)  # as options of nvcc

    def __str__(self) -> str:
        """Targets, such as "sm_80 sm_90 +PTX"."""
        names = re.findall(r"code=(sm_\w+)", " ".join(self.architectures))
        ptx = ["+PTX"] if "code=compute" in " ".join(self.architectures) else []
        return " ".join([*sorted(names, key=lambda name: int(re.sub(r"\D", "", name))), *ptx])


class NoCuda(Exception):
    """The CUDA kernels cannot be built; the arguments are the reason and the remedy."""


def find_toolkit(wanted: str) -> Cuda:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        # It may be a wrapper in another directory; its dry run prints the toolkit's.
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        plan = subprocess.run(command, capture_output=True, text=True).stderr
        homes += [os.path.dirname(programs) for programs in re.findall(r"_HERE_=(\S+)", plan)]
    for home in filter(None, [*homes, *TOOLKITS]):
        headers = [*glob(f"{home}/include/cuda_runtime.h"), *glob(f"{home}/targets/*/include/cuda_runtime.h")]
        archives = [*glob(f"{home}/lib*/libcudart_static.a"), *glob(f"{home}/targets/*/lib/libcudart_static.a")]
        if headers and archives and os.access(f"{home}/bin/nvcc", os.X_OK):
            output = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
            if version := re.search(r"release ([\d.]+)", output):
                return Cuda(home, os.path.dirname(headers[0]), os.path.dirname(archives[0]), version[1])
    raise NoCuda(
        "no CUDA toolkit with nvcc, cuda_runtime.h and libcudart_static.a found",
        f"install CUDA {wanted}, or set CUDA_HOME to its directory,",
    )


def find_architectures(cuda: Cuda) -> list[str]:
    from torch.utils import cpp_extension

    requested = os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    try:
        options = cpp_extension._get_cuda_arch_flags()
    except (ValueError, IndexError):  # a name unknown to torch, or "native" without a GPU
        options = []
    numbers = {option: int(re.search(r"compute_(\d+)", option)[1]) for option in options}
    options = [option for option in options if numbers[option] >= 80]  # container images list older ones as well
    if not options:
        raise NoCuda(
            f"TORCH_CUDA_ARCH_LIST={requested} names no architecture of 8.0 or newer",
            f"set it to a list such as {ARCHITECTURES}",
        )
    if max(numbers.values()) >= 100 and tuple(map(int, cuda.version.split("."))) < (12, 8):
        raise NoCuda(
            f"nvcc {cuda.version} of {cuda.home} does not support sm_100",
            "install CUDA 12.8 or newer, or set TORCH_CUDA_ARCH_LIST to your GPUs' architectures, such as 8.0;9.0+PTX,",
        )
    # The kernels use no feature newer than 8.0. Most of nvcc's time is compiling to PTX, and one PTX for all up to 9.0
    # gives (nearly) the same instructions; for 10.0 a PTX of its own gives shorter code.
    return [re.sub(r"compute_\d\d,code=sm_", "compute_80,code=sm_", option) for option in options]


def find_cuda() -> Cuda | None:
    """The toolkit that builds the CUDA kernels, or None to build without them."""
    switch = os.environ.get("LFCC_BUILD_CUDA", "auto")
    if switch not in ("0", "1", "auto"):
        raise SystemExit(f"LFCC_BUILD_CUDA={switch}: expected 0, 1 or auto")
    if switch == "0" or not CUDA_SOURCES:
        return None
    import torch

    torch_cuda = torch.version.cuda
    if switch == "auto" and torch_cuda is None:
        return None
    try:
        cuda = find_toolkit(torch_cuda or "12.8 or newer")
        if torch_cuda and torch_cuda.split(".")[0] != cuda.version.split(".")[0]:
            raise NoCuda(
                f"nvcc {cuda.version} of {cuda.home} does not match CUDA {torch_cuda} of torch {torch.__version__}",
                f"install CUDA {torch_cuda}, or set CUDA_HOME to its directory,",
            )
        cuda.architectures = find_architectures(cuda)
    except NoCuda as missing:
        problem, remedy = missing.args
        if switch == "1":
            raise SystemExit(f"LFCC_BUILD_CUDA=1: {problem}; {remedy} and build again") from None
        warn(f"{problem}, installing without CUDA kernels; {remedy} and install again")
        return None
    return cuda


def kernels(cuda: Cuda | None) -> Extension:
    import torch
    from torch.utils import cpp_extension

    oldest_torch = "0x020b000000000000"  # 2.11
    sources = ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    flags, link = {"cxx": CXX_FLAGS}, {"extra_link_args": ["-fopenmp"]}
    if cuda:
        cpp_extension.CUDA_HOME = cuda.home  # torch may have found another one, or none without CUDA
        sources += [*CUDA_SOURCES, *sorted(glob("csrc/cuda/*.cpp"))]
        flags = {"cxx": [*CXX_FLAGS, "-isystem", cuda.headers], "nvcc": [*NVCC_FLAGS, *cuda.architectures]}
        if torch.version.cuda is None:  # then the build does not track headers of .cu files
            flags["nvcc"].append(f"-DLFCC_HEADERS={zlib.crc32(b''.join(Path(name).read_bytes() for name in HEADERS))}")
        # The runtime is linked statically, so the library also loads without CUDA. The weak symbol of torch's stream
        # is in libtorch_cuda, found through libtorch, which the linker must not drop although nothing else uses it.
        link = {
            "library_dirs": [cuda.archives],
            "libraries": ["cudart_static", "dl", "rt", "pthread"],
            "extra_link_args": ["-fopenmp", "-Wl,--push-state,--no-as-needed,-ltorch,--pop-state"],
        }
    extension = cpp_extension.CppExtension(
        "lfcc_kernels._C",
        sources,
        include_dirs=[CSRC],
        define_macros=[("TORCH_TARGET_VERSION", oldest_torch)],
        py_limited_api=True,
        depends=HEADERS,
        extra_compile_args=flags,
        **link,
    )
    extension.libraries.remove("c10")  # not part of the stable ABI
    return extension


def host(compiler: str, cuda: Cuda | None) -> Extension:
    import pybind11
    import torch

    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout
    facts = {
        "LFCC_COMPILER": version.splitlines()[0],
        "LFCC_FLAGS": " ".join(CXX_FLAGS),
        "LFCC_BUILD_TORCH": torch.__version__,
        "LFCC_BUILD_MACHINE": platform.machine(),
        "LFCC_CUDA": cuda.version if cuda else "",
        "LFCC_CUDA_ARCHITECTURES": str(cuda or ""),
    }
    return Extension(
        "lfcc_kernels._host",
        ["csrc/host.cpp"],
        include_dirs=[CSRC, pybind11.get_include()],
        define_macros=[(name, f'"{value}"') for name, value in facts.items()],
        language="c++",
        depends=HEADERS,
        extra_compile_args=CXX_FLAGS,
        extra_link_args=["-fopenmp"],
    )


def extensions() -> dict:
    cuda, compiler = find_cuda(), find_compiler()
    if compiler is None:
        if os.environ.get("LFCC_BUILD_CUDA") == "1":
            raise SystemExit(
                "LFCC_BUILD_CUDA=1: no C++ compiler found; install g++ 12 or newer, or set CXX, and build again"
            )
        warn(
            "no C++ compiler found, installing without compiled kernels (eager backend only); "
            "install g++ 12 or newer, or set CXX, and install again"
        )
        return {}
    from torch.utils.cpp_extension import BuildExtension

    # By default ninja runs two more jobs, which slows the longest one down; nvcc itself has two threads.
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))

    class IncrementalBuild(BuildExtension):
        """Keeps object files, so that ninja compiles only changed ones; pip uses a new directory every time."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = f"build/objects-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

    modules = [kernels(cuda)]
    if Path(sysconfig.get_path("include"), "Python.h").exists():
        modules.append(host(compiler, cuda))
    else:
        warn(
            "no Python.h found (Debian, Ubuntu: python3-dev), installing without lfcc_kernels._host, "
            "which the kernels do not need"
        )
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": IncrementalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(**extensions())
