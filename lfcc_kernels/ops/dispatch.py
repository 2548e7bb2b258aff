"""Selects the backend of a call: `use_backend` in code, LFCC_BACKEND in the environment, otherwise `auto`.

`auto` reads the committed dispatch.json, which `lfcc bench --dispatch` writes from benchmark records:

    {"cpu" or "sm_90": [{"op", "dtype", "up_to", "backend", "record", "cases", "worst"}, ...]}

The lines of an op and dtype are sorted by `up_to`. The first with `up_to` at least the size of the call gives the
backend; null means no bound. The other fields give the origin of a line: the record, the number of measured cases, and
the smallest ratio of the second fastest backend's time to the selected one's among them. A GPU uses the lines of the
nearest older compute capability that was measured. Calls that no line covers use FIXED_ORDER.
"""

import functools
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lfcc_kernels.backends import cuda, native, triton

AUTO = "auto"
WITH_KERNELS = ("cpu", "triton", "cuda")
TABLE = Path(__file__).with_name("dispatch.json")
FIXED_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}  # then eager


class _Selected(threading.local):
    name = os.environ.get("LFCC_BACKEND", AUTO)


_selected = _Selected()


def available_backends() -> tuple[str, ...]:
    """Names of the backends that are available on this machine, e.g. ("eager", "cpu").

    "eager" is always available. `lfcc info` prints why another one is not.
    """
    return ("eager", *(name for name in WITH_KERNELS if not why_missing(name)))


def why_missing(name: str) -> str:
    """Why a backend is not available on this machine, or an empty string."""
    match name:
        case "cpu":
            return native.missing
        case "triton":
            return triton.missing()
        case "cuda":
            return cuda.missing()
    return ""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context manager that selects the backend of all ops called in its block, in the current thread.

    The environment variable LFCC_BACKEND sets the default of a process.

    Args:
        name: One of

            - "auto": the backend measured to be fastest for the device, dtype and size of a call. Without
              measurements, "cpu" for CPU tensors; for CUDA tensors "triton", then "cuda"; otherwise "eager".
            - "eager": plain PyTorch, the reference. Any device; twice differentiable.
            - "cpu": compiled C++ kernels, for CPU tensors.
            - "triton": Triton kernels, for tensors on an NVIDIA GPU.
            - "cuda": compiled CUDA C++ kernels, for tensors on an NVIDIA GPU.

    Raises:
        ValueError: The name is unknown, or the backend is not available on this machine; the message says why. A
            call inside the block raises it if the tensors are on a device that the backend does not support.
    """
    _check(name)
    previous, _selected.name = _selected.name, name
    try:
        yield
    finally:
        _selected.name = previous


def select(op: str, device: torch.device, dtype: torch.dtype, size: int) -> str:
    """The backend of a call.

    Args:
        op: "lowpass" or "info_nce".
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        size: Size of the call: elements of the map, or pairs of rows.

    Raises:
        ValueError: A backend was selected by name, and it is unknown or does not support the device.
    """
    name = _selected.name
    if name == AUTO:
        return _fastest(op, device, dtype, size)
    _check(name)
    supported = {"cpu": "cpu", "triton": triton.DEVICE, "cuda": cuda.device()}.get(name, device.type)
    if device.type != supported:
        raise ValueError(
            f"backend {name!r} was selected but the tensors are on {device}; move them with .to({supported!r}), "
            "or select use_backend('auto')"
        )
    return name


def table() -> dict[str, list[dict[str, Any]]]:
    """The committed dispatch.json."""
    return json.loads(TABLE.read_text())


def _fastest(op: str, device: torch.device, dtype: torch.dtype, size: int) -> str:
    for up_to, backends in _lines(op, device, dtype):  # loops, because generators cost a microsecond more
        # Comparing a traced size specializes the graph to one side of the bound. torch.compile then makes a second
        # graph; an exported graph is for all sizes, so it gets the backend of the largest.
        if up_to is None or (not torch.compiler.is_exporting() and size <= up_to):
            for backend in backends:
                if not why_missing(backend):
                    return backend
    raise AssertionError("unreachable: the last line has no bound, and eager is always available")


@torch.compiler.assume_constant_result
def _lines(op: str, device: torch.device, dtype: torch.dtype) -> tuple[tuple[int | None, tuple[str, ...]], ...]:
    """(up_to, backends to try in order) of each applicable line; the last has no bound."""
    return _cached_lines(op, device, dtype)


@functools.cache
def _cached_lines(op: str, device: torch.device, dtype: torch.dtype) -> tuple[tuple[int | None, tuple[str, ...]], ...]:
    measured, name = table(), str(dtype).removeprefix("torch.")
    # The GPU kernels multiply float64 without tensor cores, unlike torch's own GEMMs.
    kernels = () if device.type == "cuda" and dtype == torch.float64 else FIXED_ORDER.get(device.type, ())
    order = (*kernels, "eager")
    for machine in _machines(device, measured):
        lines = [line for line in measured[machine] if line["op"] == op and line["dtype"] == name]
        if lines:
            return tuple((line["up_to"], (line["backend"], *order)) for line in lines)
    return ((None, order),)


def _machines(device: torch.device, measured: Iterable[str]) -> list[str]:
    """The measured machines whose lines apply to a device, nearest first."""
    if device.type != "cuda" or not torch.cuda.is_available():  # fake tensors can be on a GPU that does not exist
        return [name for name in measured if name == device.type]
    major, minor = torch.cuda.get_device_capability(device)
    older = [int(name[3:]) for name in measured if name.startswith("sm_") and int(name[3:]) <= 10 * major + minor]
    return [f"sm_{capability}" for capability in sorted(older, reverse=True)]


def _check(name: str) -> None:
    reason = why_missing(name)
    if name in (AUTO, "eager", *WITH_KERNELS) and not reason:
        return
    reason = f" ({reason})" if reason else ""
    raise ValueError(
        f"backend {name!r} is not available{reason}; available are auto, {', '.join(available_backends())}"
    )
