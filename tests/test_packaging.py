"""The compiled libraries, the wheel, the build switches, and an installation without a compiler."""

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lfcc_kernels.backends import native

ROOT = Path(__file__).resolve().parent.parent

compiled = pytest.mark.skipif(bool(native.missing), reason="the kernels are not built")
with_cuda = pytest.mark.skipif(
    native.host is None or bool(native.missing) or not native.host.build()["cuda"], reason="no CUDA kernels are built"
)

USE_THE_PACKAGE = """
import torch, lfcc_kernels as lk
x = torch.randn(2, 3, 8, 8, requires_grad=True)
y = lk.lowpass(x, (1, 2))
assert torch.allclose(y[:, 0], x.mean((2, 3)), atol=1e-6)
rows = y.flatten(1)
lk.info_nce(rows, rows.detach().flip(0)).backward()
assert x.grad.isfinite().all()
print(lk.__file__, *lk.available_backends())
"""

INFO_AND_ERROR = """
from lfcc_kernels.info import report
print(report())
with lk.use_backend("cpu"):
    pass
"""


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1", **environment}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def library() -> Path:
    return next(native.PACKAGE.glob("_C*.so"))


@pytest.fixture(scope="module")
def symbols(library) -> list[tuple[str, str]]:
    """Kind (of nm) and name of the dynamic symbols of the library."""
    nm = shutil.which("nm") or pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run([nm, "-D", "-C", library], capture_output=True, text=True)
    return re.findall(r"^[0-9a-f ]{16} (\w) (.*)$", listing.stdout, re.MULTILINE)


@compiled
def test_kernels_use_the_stable_abi_only(symbols):
    undefined = [name for kind, name in symbols if kind in "Uw"]
    assert any(name.startswith("aoti_torch_") for name in undefined)
    # libtorch's C++ interface changes from one version to the next, and Python's from one Python to the next.
    unstable = re.compile(r"\b(Py|_Py)\w+|\b(c10|at|caffe2)::|\btorch::(jit|autograd|Library)")
    assert [name for name in undefined if unstable.search(name)] == []


@compiled
def test_kernels_load_without_cuda(symbols):
    """However they were built, they need only symbols of a CPU-only torch, and none of CUDA."""
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
    of_torch = [name for kind, name in symbols if kind == "U" and name.startswith(("aoti_", "torch_"))]
    assert of_torch and [name for name in of_torch if not hasattr(torch_cpu, name)] == []
    # The static CUDA runtime must not be exported: the one that torch has loaded would replace it.
    assert [name for kind, name in symbols if re.match(r"(__)?cu(da)?[A-Z]", name) and kind != "w"] == []


@with_cuda
@pytest.mark.parametrize("name", ["lowpass.cuda", "lowpass_foreach.cuda", "info_nce.cuda", "lowpass", "info_nce_grad"])
def test_cuda_kernels_are_registered(name):
    """Under their own overloads for Python, and under the op of CPU tensors for C++ programs."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lfcc::{name}", "CUDA")


@with_cuda
def test_cuda_kernels_find_the_stream_of_torch(library):
    """The only symbol of torch's CUDA library, looked up in the library and its dependencies."""
    stream = "aoti_torch_get_current_cuda_stream"
    assert hasattr(ctypes.CDLL(str(library)), stream) == (torch.version.cuda is not None)


@compiled
@pytest.mark.skipif(platform.machine() != "x86_64", reason="clones exist on x86-64")
def test_kernels_are_cloned_for_cpu_levels(library):
    if native.host is not None and "AVX2" not in native.host.build()["cpu_levels"]:
        pytest.skip("the compiler that built them makes no clones")
    content = library.read_bytes()
    assert b".arch_x86_64_v3" in content and b".arch_x86_64_v4" in content


@pytest.mark.slow
@compiled
def test_wheel(tmp_path):
    # From the objects of the installed build, so only what changed since then is compiled.
    config = tmp_path / "setup.cfg"
    config.write_text(f"[build]\nbuild_base = {tmp_path}/build\n[egg_info]\negg_base = {tmp_path}\n")
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path / "dist")]
    built = run(*command, cwd=ROOT, DIST_EXTRA_CONFIG=str(config))
    assert built.returncode == 0, built.stderr

    (wheel,) = (tmp_path / "dist").iterdir()
    assert re.fullmatch(r"lfcc_kernels-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {"lfcc_kernels/_C.abi3.so", "lfcc_kernels/py.typed"} <= set(names)
    assert any(re.fullmatch(r"lfcc_kernels/_host\..*so", name) for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lfcc_kernels"}
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".cuh", ".h", ".o")) or "tests" in name]
    assert any(name.endswith("LICENSE") for name in names)

    used = run(sys.executable, "-c", USE_THE_PACKAGE, cwd=tmp_path / "site")
    assert used.returncode == 0, used.stderr
    assert used.stdout.split() == [str(tmp_path / "site/lfcc_kernels/__init__.py"), "eager", "cpu"]


@pytest.mark.slow
def test_without_a_compiler(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "lfcc_kernels", tmp_path / "lfcc_kernels", ignore=ignore)
    site = tmp_path / "site"
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(site)]
    built = run(*command, cwd=tmp_path, CXX="/nonexistent/c++")
    assert built.returncode == 0, built.stderr
    assert "no C++ compiler found" in built.stderr and "eager backend only" in built.stderr

    used = run(sys.executable, "-c", USE_THE_PACKAGE + INFO_AND_ERROR, cwd=site)
    assert used.returncode == 1
    located, _, information = used.stdout.partition("\n")
    assert located.split() == [str(site / "lfcc_kernels/__init__.py"), "eager"]
    assert re.search(r"cpu +not available: .*_C is missing.*install a C\+\+ compiler", information)
    assert "ValueError: backend 'cpu' is not available" in used.stderr


USE_A_KERNEL = "import sys, torch, lfcc_kernels as lk; lk.lowpass(torch.ones(1, 1, 4, 4)); lk.LFCCLoss([1], [1])"


def test_core_imports_with_torch_alone():
    others = "timm torchvision tensorboard torchmetrics yaml tqdm matplotlib scipy sklearn triton"
    used = run(
        *(sys.executable, "-c", f"import sys; sys.modules.update(dict.fromkeys('{others}'.split())); {USE_A_KERNEL}"),
        cwd=ROOT,
    )
    assert used.returncode == 0, used.stderr


def test_triton_is_imported_by_its_first_call_only():
    """A user of the CPU may not have it."""
    loaded = "print('lfcc_kernels.backends.triton.runtime' in sys.modules)"
    used = run(
        sys.executable, "-c", f"{USE_A_KERNEL}; lk.available_backends(); {loaded}", cwd=ROOT, LFCC_BACKEND="auto"
    )
    assert used.stdout.strip() == "False", used.stderr


def test_unknown_switch():
    refused = run(sys.executable, "setup.py", "--version", cwd=ROOT, LFCC_BUILD_CUDA="maybe")
    assert refused.returncode == 1
    assert refused.stderr.strip() == "LFCC_BUILD_CUDA=maybe: expected 0, 1 or auto"


def load_setup() -> ModuleType:
    specification = importlib.util.spec_from_file_location("lfcc_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.skipif(native.host is None, reason="lfcc_kernels/_host is not built for this Python")
def test_cuda_kernels_are_built_if_there_is_a_toolkit(monkeypatch):
    """Otherwise their tests would be skipped on a machine with a toolkit."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))  # restored after the test
    if load_setup().find_cuda():
        assert native.host.build()["cuda"], "build again, or set LFCC_BUILD_CUDA=0"


@pytest.fixture
def build(monkeypatch) -> ModuleType:
    """setup.py on a machine without a toolkit."""
    monkeypatch.chdir(ROOT)
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("LFCC_BUILD_CUDA", "auto")
    monkeypatch.setenv("PATH", "/nonexistent")
    module = load_setup()
    module.TOOLKITS = []
    return module


@pytest.fixture
def install_toolkit(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Installs a fake toolkit of a version, with a wrapper of its nvcc on PATH."""

    def script(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def install(version: str) -> Path:
        home = tmp_path / "toolkit"
        for name in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).touch()
        output = f"Cuda compilation tools, release {version}, V{version}.85"
        script(home / "bin/nvcc", f'[ "$1" = --version ] && echo "{output}" || echo "#\\$ _HERE_={home}/bin" >&2')
        script(tmp_path / "bin/nvcc", f'exec {home}/bin/nvcc "$@"')
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
        return home

    return install


def test_toolkit_behind_a_wrapper(build, install_toolkit, monkeypatch, capsys):
    home = install_toolkit("13.1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # the minor version may differ
    cuda = build.find_cuda()
    assert (cuda.home, cuda.version, str(cuda)) == (str(home), "13.1", "sm_80 sm_90 sm_100 +PTX")
    assert (cuda.headers, cuda.archives) == (f"{home}/include", f"{home}/lib64")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.6;9.0")
    assert str(build.find_cuda()) == "sm_86 sm_90"
    monkeypatch.setenv("LFCC_BUILD_CUDA", "0")
    assert build.find_cuda() is None
    assert capsys.readouterr().err == ""


def test_torch_without_cuda(build, install_toolkit, monkeypatch, capsys):
    install_toolkit("12.8")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert build.find_cuda() is None and capsys.readouterr().err == ""
    monkeypatch.setenv("LFCC_BUILD_CUDA", "1")
    assert build.find_cuda().version == "12.8"


@pytest.mark.parametrize(
    ("of_torch", "of_nvcc", "architectures", "message"),
    [
        ("13.0", "", "", "no CUDA toolkit .* install CUDA 13.0, or set CUDA_HOME"),
        ("12.9", "13.0", "", "nvcc 13.0 of .* does not match CUDA 12.9 of torch .* install CUDA 12.9"),
        ("12.6", "12.6", "", "nvcc 12.6 of .* does not support sm_100.* install CUDA 12.8 or newer"),
        ("13.0", "13.0", "7.5", "TORCH_CUDA_ARCH_LIST=7.5 names no architecture of 8.0 or newer.* such as 8.0;9.0"),
        ("13.0", "13.0", "Turin", "TORCH_CUDA_ARCH_LIST=Turin names no architecture"),
    ],
)
def test_one_line_if_cuda_kernels_cannot_be_built(
    build, install_toolkit, monkeypatch, capsys, of_torch, of_nvcc, architectures, message
):
    if of_nvcc:
        install_toolkit(of_nvcc)
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    assert build.find_cuda() is None
    (notice,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"lfcc_kernels: {message}.* and install again", notice)
    assert ", installing without CUDA kernels; " in notice

    monkeypatch.setenv("LFCC_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=f"^LFCC_BUILD_CUDA=1: {message}.* and build again$"):
        build.find_cuda()


def test_cuda_kernels_need_a_compiler(build, monkeypatch):
    monkeypatch.setattr(build, "find_cuda", lambda: None)
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("LFCC_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=r"^LFCC_BUILD_CUDA=1: no C\+\+ compiler found; install"):
        build.extensions()
