"""Which backend serves a call: `use_backend` in code, LFCC_BACKEND in the environment, else `auto`.

`auto` goes by the committed dispatch.json, which `lfcc bench --dispatch` writes from records of the benchmark:

    {"cpu" or "sm_90": [{"op", "dtype", "up_to", "backend", "record", "cases", "worst"}, ...]}

Of the lines of an op and dtype, smallest `up_to` first, the first that reaches the size of the call names the backend;
null reaches any. The rest says where a line comes from: the record, how many measured cases are behind it, and the
smallest ratio of the runner-up's time to the chosen one's among them. A GPU goes by the nearest older compute
capability that was measured. What no line covers goes by FIXED_ORDER.
"""

import functools
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lfcc_kernels.backends import cuda, native, triton

AUTO = "auto"
WITH_KERNELS = ("cpu", "triton", "cuda")
TABLE = Path(__file__).with_name("dispatch.json")
FIXED_ORDER = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}  # then eager


class _Choice(threading.local):
    name = os.environ.get("LFCC_BACKEND", AUTO)


_choice = _Choice()


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can serve on this machine; "eager" always can."""
    return ("eager", *(name for name in WITH_KERNELS if not why_missing(name)))


def why_missing(name: str) -> str:
    """Why a backend cannot serve on this machine, or an empty string."""
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
    """Serve every op called in this block, in this thread, by one backend.

    Args:
        name: "eager" (plain PyTorch: the oracle, any device, differentiable twice), "cpu" (the compiled kernels),
            "triton" or "cuda" (NVIDIA GPUs; the second are compiled kernels too) or "auto" (the fastest that can
            serve). The environment variable LFCC_BACKEND sets the same for a process.

    Raises:
        ValueError: the name is unknown, or the backend cannot serve on this machine, with the reason.
    """
    _check(name)
    previous, _choice.name = _choice.name, name
    try:
        yield
    finally:
        _choice.name = previous


def select(op: str, device: torch.device, dtype: torch.dtype, size: int) -> str:
    """The backend that serves an op on tensors of this device and dtype.

    Args:
        op: "lowpass" or "info_nce".
        device: Where the tensors are.
        dtype: Their type.
        size: Of the call: elements of the map, or pairs of rows.

    Raises:
        ValueError: a backend was asked for by name, and it is unknown or cannot serve tensors there.
    """
    name = _choice.name
    if name == AUTO:
        return _fastest(op, device, dtype, size)
    _check(name)
    home = {"cpu": "cpu", "triton": triton.DEVICE, "cuda": cuda.device()}.get(name, device.type)
    if device.type != home:
        raise ValueError(
            f"backend {name!r} was asked for by name, but the tensors are on {device}; "
            f"move them with .to({home!r}), or use_backend('auto')"
        )
    return name


def table() -> dict[str, list[dict]]:
    """The committed table."""
    return json.loads(TABLE.read_text())


def _fastest(op: str, device: torch.device, dtype: torch.dtype, size: int) -> str:
    for up_to, backends in _lines(op, device, dtype):  # loops, since generators cost a microsecond more
        # A traced comparison binds the graph to one side of it. An exported graph is for all sizes, so it gets the
        # backend of the largest; torch.compile makes another graph.
        if up_to is None or (not torch.compiler.is_exporting() and size <= up_to):
            for backend in backends:
                if not why_missing(backend):
                    return backend
    raise AssertionError("the last line has no bound, and eager can always serve")


@torch.compiler.assume_constant_result
def _lines(op: str, device: torch.device, dtype: torch.dtype) -> tuple[tuple[int | None, tuple[str, ...]], ...]:
    """Bound of each line that holds here and the backends to try, in that order; the last has no bound."""
    return _cached_lines(op, device, dtype)


@functools.cache
def _cached_lines(op: str, device: torch.device, dtype: torch.dtype) -> tuple[tuple[int | None, tuple[str, ...]], ...]:
    known, name = table(), str(dtype).removeprefix("torch.")
    # Kernels multiply float64 without tensor cores, which torch's own products on a GPU use.
    kernels = () if device.type == "cuda" and dtype == torch.float64 else FIXED_ORDER.get(device.type, ())
    order = (*kernels, "eager")
    for machine in _machines(device, known):
        lines = [line for line in known[machine] if line["op"] == op and line["dtype"] == name]
        if lines:
            return tuple((line["up_to"], (line["backend"], *order)) for line in lines)
    return ((None, order),)


def _machines(device: torch.device, known: Iterable[str]) -> list[str]:
    """The measured machines whose lines hold for a device, the nearest first."""
    if device.type != "cuda" or not torch.cuda.is_available():  # fake tensors can be on a GPU that is not there
        return [name for name in known if name == device.type]
    major, minor = torch.cuda.get_device_capability(device)
    older = [int(name[3:]) for name in known if name.startswith("sm_") and int(name[3:]) <= 10 * major + minor]
    return [f"sm_{capability}" for capability in sorted(older, reverse=True)]


def _check(name: str) -> None:
    reason = why_missing(name)
    if name in (AUTO, "eager", *WITH_KERNELS) and not reason:
        return
    reason = f" ({reason})" if reason else ""
    raise ValueError(
        f"backend {name!r} is not available{reason}; available are auto, {', '.join(available_backends())}"
    )
