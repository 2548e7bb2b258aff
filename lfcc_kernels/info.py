"""The report of `lfcc info`: versions, backends and reasons if they are missing, build, threads, optional packages."""

import importlib.metadata
import os
import platform
import re

import torch

import lfcc_kernels
from lfcc_kernels.backends import cuda, native, triton
from lfcc_kernels.ops import dispatch
from lfcc_kernels.version import package_version

_DISTRIBUTION = "lfcc-kernels"


def report() -> str:
    """The state of this installation as text; needs torch only."""
    sections = {
        f"lfcc_kernels {lfcc_kernels.__version__}": _versions(),
        "backends": _backends(),
        "compiled kernels": _build(),
        "threads": _threads(),
        "optional packages": _extras(),
    }
    return "\n\n".join(_section(title, rows) for title, rows in sections.items())


def _section(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows.items())])


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "folder": str(native.PACKAGE),
    }


def _backends() -> dict[str, str]:
    chosen = os.environ.get("LFCC_BACKEND")
    return {
        "eager": "available: plain PyTorch, any device",
        "cpu": f"not available: {native.missing}" if native.missing else "available: compiled, CPU tensors",
        "triton": f"not available: {triton.missing()}" if triton.missing() else f"available: {_triton()}",
        "cuda": f"not available: {cuda.missing()}" if cuda.missing() else "available: compiled, CUDA tensors",
        "in use": f"{chosen}, from LFCC_BACKEND"
        if chosen
        else f"auto: {_measured()}the first available of cpu, triton and cuda, otherwise eager",
    }


def _measured() -> str:
    """The records behind the dispatch table of `auto`, by device."""
    devices = {name: sorted({line["record"] for line in lines}) for name, lines in dispatch.table().items() if lines}
    records = "; ".join(f"on {name} {', '.join(records)}" for name, records in devices.items())
    return f"by table ({records}), otherwise " if records else ""


def _triton() -> str:
    import triton as compiler  # installed, because nothing is missing

    version = compiler.__version__
    if triton.INTERPRET:
        return f"Triton {version} in its interpreter, CPU tensors, for tests"
    from lfcc_kernels.backends.triton import runtime, tiles

    table = tiles.table(runtime.device_props(torch.device("cuda")).capability)
    return f"Triton {version} on {torch.cuda.get_device_name()}, tiles {table['source']}"


def _build() -> dict[str, str]:
    if native.missing:
        return {"none": "see backend cpu"}
    if native.host is None:
        return {"unknown": "lfcc_kernels/_host is missing or for another Python; the kernels do not need it"}
    facts = native.host.build()
    return {
        "compiler": facts["compiler"],
        "flags": facts["flags"],
        "built with": f"torch {facts['torch']} on {facts['machine']}",
        "CPU levels": f"{facts['cpu_levels']}; this CPU runs {native.host.cpu_level()}",
        "CUDA": f"nvcc {facts['cuda']} for {facts['cuda_architectures']}"
        if facts["cuda"]
        else "none: build with LFCC_BUILD_CUDA=1 to get CUDA kernels or the reason why not",
    }


def _threads() -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "torch": f"{torch.get_num_threads()}; change with torch.set_num_threads or OMP_NUM_THREADS",
        "cores": f"{cores} available to this process",
    }


def _extras() -> dict[str, str]:
    try:
        requirements = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {"unknown": f"{_DISTRIBUTION} is not installed but runs from its folder; run `pip install .`"}
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        match = re.match(r"""([\w.-]+).*extra == ['"](\w+)['"]""", requirement)
        if match and match[1] != _DISTRIBUTION:
            extras.setdefault(match[2], []).append(match[1])
    return {extra: _installed(extra, packages) for extra, packages in extras.items()}


def _installed(extra: str, packages: list[str]) -> str:
    versions = {package: package_version(package) for package in packages}
    found = [f"{package} {version}" for package, version in versions.items() if version]
    if missing := [package for package in packages if not versions[package]]:
        found.append(f"missing {', '.join(missing)} (pip install '{_DISTRIBUTION}[{extra}]')")
    return ", ".join(found)
