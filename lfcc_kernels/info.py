"""What `lfcc info` prints: versions, backends and why not, what was built, what is missing."""

import importlib.metadata
import os
import platform
import re

import torch

import lfcc_kernels
from lfcc_kernels.backends import cuda, native, triton
from lfcc_kernels.ops import dispatch

_DISTRIBUTION = "lfcc-kernels"


def report() -> str:
    """The state of this installation as readable text; needs torch alone."""
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
        else f"auto: {_measured()}the first of cpu, triton and cuda that can serve, else eager",
    }


def _measured() -> str:
    """What `auto` goes by first: for each kind of device the records behind its table."""
    devices = {name: sorted({line["record"] for line in lines}) for name, lines in dispatch.table().items() if lines}
    records = "; ".join(f"on {name} {', '.join(records)}" for name, records in devices.items())
    return f"by table ({records}), else " if records else ""


def _triton() -> str:
    import triton as compiler  # it is there, since nothing is missing

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
        return {"unknown": "lfcc_kernels/_host is missing or of another Python; no kernel needs it"}
    facts = native.host.build()
    return {
        "compiler": facts["compiler"],
        "flags": facts["flags"],
        "built with": f"torch {facts['torch']} on {facts['machine']}",
        "CPU levels": f"{facts['cpu_levels']}; this CPU runs {native.host.cpu_level()}",
        "CUDA": f"nvcc {facts['cuda']} for {facts['cuda_architectures']}"
        if facts["cuda"]
        else "none: a build with LFCC_BUILD_CUDA=1 has CUDA kernels or says what is missing",
    }


def _threads() -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "torch": f"{torch.get_num_threads()}, set by torch.set_num_threads or OMP_NUM_THREADS",
        "cores": f"{cores} that this process may use",
    }


def _extras() -> dict[str, str]:
    try:
        requirements = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {"unknown": f"{_DISTRIBUTION} is not installed, it runs from its folder; try `pip install .`"}
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        match = re.match(r"""([\w.-]+).*extra == ['"](\w+)['"]""", requirement)
        if match and match[1] != _DISTRIBUTION:
            extras.setdefault(match[2], []).append(match[1])
    return {extra: _installed(extra, packages) for extra, packages in extras.items()}


def _installed(extra: str, packages: list[str]) -> str:
    found, missing = [], []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        found.append(f"missing {', '.join(missing)} (pip install '{_DISTRIBUTION}[{extra}]')")
    return ", ".join(found)
