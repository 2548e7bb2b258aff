"""`lfcc info`, with everything built and with parts missing."""

import importlib.metadata
import platform
import re
from types import SimpleNamespace

import pytest
import torch

import lfcc_kernels
from lfcc_kernels import info
from lfcc_kernels.backends import native
from lfcc_kernels.cli import main
from lfcc_kernels.ops import dispatch


def test_versions():
    report = info.report()
    for version in (lfcc_kernels.__version__, torch.__version__, platform.python_version()):
        assert version in report


def test_command_prints_the_report(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out.strip() == info.report()


def test_package_and_metadata_agree_on_the_version():
    assert importlib.metadata.version("lfcc-kernels") == lfcc_kernels.__version__


@pytest.mark.skipif(native.host is None, reason="lfcc_kernels/_host is not built for this Python")
def test_build_facts():
    report = info.report()
    facts = native.host.build()
    assert facts["compiler"] in report and facts["torch"] in report and "-O3" in facts["flags"]
    assert "-march" not in facts["flags"]
    assert native.host.cpu_level() in facts["cpu_levels"].split(", ")
    assert 1 <= native.host.cores() <= 4096


@pytest.mark.skipif(native.host is None, reason="lfcc_kernels/_host is not built for this Python")
@pytest.mark.parametrize(
    ("version", "architectures", "line"),
    [("13.0", "sm_90 +PTX", "nvcc 13.0 for sm_90 +PTX"), ("", "", "none: build with LFCC_BUILD_CUDA=1 ")],
)
def test_cuda_build_facts(monkeypatch, version, architectures, line):
    facts = native.host.build()
    assert bool(facts["cuda"]) == bool(facts["cuda_architectures"])
    facts |= {"cuda": version, "cuda_architectures": architectures}
    monkeypatch.setattr(native, "missing", "")
    monkeypatch.setattr(native, "host", SimpleNamespace(build=lambda: facts, cpu_level=native.host.cpu_level))
    assert re.search(rf"^  CUDA +{re.escape(line)}", info.report(), re.MULTILINE)


def test_kernels_missing(monkeypatch):
    monkeypatch.setattr(native, "missing", "no library; install g++")
    report = info.report()
    assert "not available: no library; install g++" in report
    assert "cpu" not in lfcc_kernels.available_backends()


def test_host_missing(monkeypatch):
    monkeypatch.setattr(native, "missing", "")
    monkeypatch.setattr(native, "host", None)
    assert "_host is missing or for another Python" in info.report()


def test_backend_of_the_environment(monkeypatch):
    monkeypatch.setenv("LFCC_BACKEND", "eager")
    assert "eager, from LFCC_BACKEND" in info.report()


def test_records_of_the_dispatch_table(monkeypatch):
    monkeypatch.delenv("LFCC_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "table", lambda: {"cpu": [{"record": "a.json"}] * 2, "sm_90": [{"record": "b.json"}]})
    assert "auto: by table (on cpu a.json; on sm_90 b.json), otherwise the first available of cpu" in info.report()
    monkeypatch.setattr(dispatch, "table", lambda: {"cpu": []})
    assert "auto: the first available of cpu" in info.report()


def test_optional_packages(monkeypatch):
    installed = {"timm": "1.0.20", "triton": "3.8.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        importlib.metadata,
        "requires",
        lambda _: [
            "torch>=2.11",
            'timm>=1.0.20; extra == "train"',
            'pyyaml; extra == "train"',
            'matplotlib; extra == "report"',
            'lfcc-kernels[train]; extra == "demo"',
        ],
    )
    report = info.report()
    assert "timm 1.0.20, missing pyyaml (pip install 'lfcc-kernels[train]')" in report
    assert "missing matplotlib (pip install 'lfcc-kernels[report]')" in report
    assert "demo" not in report


def test_not_installed(monkeypatch):
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert "lfcc-kernels is not installed" in info.report()


@pytest.mark.skipif(native.host is None, reason="lfcc_kernels/_host is not built for this Python")
@pytest.mark.parametrize("size", [1, 64, 1_000_003])
def test_copy_bandwidth(size):
    assert 0 < native.host.copy_bandwidth(size, 2) < 1e5


@pytest.mark.skipif(native.host is None, reason="lfcc_kernels/_host is not built for this Python")
def test_copy_bandwidth_of_no_repeats():
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        native.host.copy_bandwidth(1024, 0)
