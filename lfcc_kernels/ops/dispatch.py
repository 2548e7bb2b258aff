"""Which backend serves a call: `use_backend` in code, LFCC_BACKEND in the environment, else `auto`."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lfcc_kernels.backends import cuda, native, triton

AUTO = "auto"
WITH_KERNELS = ("cpu", "triton", "cuda")


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


def select(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves an op on tensors of this device and dtype."""
    name = _choice.name
    if name == AUTO:
        return _fastest(device, dtype)
    _check(name)
    home = {"cpu": "cpu", "triton": triton.DEVICE, "cuda": cuda.device()}.get(name, device.type)
    if device.type != home:
        raise ValueError(
            f"backend {name!r} was asked for by name, but the tensors are on {device}; "
            f"move them with .to({home!r}), or use_backend('auto')"
        )
    return name


def _fastest(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cpu" and not native.missing:
        return "cpu"
    # Kernels multiply float64 without tensor cores, which torch's own products use. No GPU has yet said which of the
    # two is faster, so the second serves where there is no Triton.
    if device.type == "cuda" and dtype != torch.float64:
        if not triton.missing():
            return "triton"
        if not cuda.missing():
            return "cuda"
    return "eager"


def _check(name: str) -> None:
    reason = why_missing(name)
    if name in (AUTO, "eager", *WITH_KERNELS) and not reason:
        return
    reason = f" ({reason})" if reason else ""
    raise ValueError(
        f"backend {name!r} is not available{reason}; available are auto, {', '.join(available_backends())}"
    )
