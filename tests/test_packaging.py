"""What is installed: the compiled libraries, the wheel, the switches, and life without a compiler."""

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lfcc_kernels.backends import native

ROOT = Path(__file__).resolve().parent.parent

compiled = pytest.mark.skipif(bool(native.missing), reason="the kernels are not built")

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

INFORM_AND_REFUSE = """
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
def undefined_symbols(library) -> list[str]:
    nm = shutil.which("nm") or pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run([nm, "-D", "-C", "--undefined-only", library], capture_output=True, text=True)
    return [line.split(maxsplit=1)[1] for line in listing.stdout.splitlines()]


@compiled
def test_kernels_use_the_stable_abi_only(undefined_symbols):
    assert any(symbol.startswith("aoti_torch_") for symbol in undefined_symbols)
    # libtorch's C++ interface changes from one version to the next, and Python's from one Python to the next.
    unstable = re.compile(r"\b(Py|_Py)\w+|\b(c10|at|caffe2)::|\btorch::(jit|autograd|Library)")
    assert [symbol for symbol in undefined_symbols if unstable.search(symbol)] == []


@compiled
@pytest.mark.skipif(platform.machine() != "x86_64", reason="clones exist on x86-64")
def test_kernels_are_cloned_for_cpu_levels(library):
    if native.host is not None and "AVX2" not in native.host.build()["cpu_levels"]:
        pytest.skip("the compiler that built them makes no clones")
    content = library.read_bytes()
    assert b".arch_x86_64_v3" in content and b".arch_x86_64_v4" in content


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
    assert "lfcc_kernels/_C.abi3.so" in names
    assert any(re.fullmatch(r"lfcc_kernels/_host\..*so", name) for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lfcc_kernels"}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".o")) or "tests" in name]
    assert any(name.endswith("LICENSE") for name in names)

    used = run(sys.executable, "-c", USE_THE_PACKAGE, cwd=tmp_path / "site")
    assert used.returncode == 0, used.stderr
    assert used.stdout.split() == [str(tmp_path / "site/lfcc_kernels/__init__.py"), "eager", "cpu"]


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

    used = run(sys.executable, "-c", USE_THE_PACKAGE + INFORM_AND_REFUSE, cwd=site)
    assert used.returncode == 1
    located, _, information = used.stdout.partition("\n")
    assert located.split() == [str(site / "lfcc_kernels/__init__.py"), "eager"]
    assert re.search(r"cpu +not available: .*_C is missing.*install a C\+\+ compiler", information)
    assert "ValueError: backend 'cpu' is not available" in used.stderr


@pytest.mark.parametrize(
    ("value", "message"), [("1", "this version has no CUDA kernels"), ("maybe", "expected 0, 1 or auto")]
)
def test_cuda_switch(value, message):
    refused = run(sys.executable, "setup.py", "--version", cwd=ROOT, LFCC_BUILD_CUDA=value)
    assert refused.returncode == 1
    assert refused.stderr.strip().startswith(f"LFCC_BUILD_CUDA={value}: ") and message in refused.stderr
