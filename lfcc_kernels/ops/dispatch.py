"""Which backend serves a call: `use_backend` in code, LFCC_BACKEND in the environment, else `auto`."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lfcc_kernels.backends import native, triton

AUTO = "auto"
WITH_KERNELS = ("cpu", "triton")


class _Choice(threading.local):
    name = os.environ.get("LFCC_BACKEND", AUTO)


_choice = _Choice()


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can serve on this machine; "eager" always can."""
    return ("eager", *(name for name in WITH_KERNELS if not why_missing(name)))


def why_missing(name: str) -> str:
    """Why a backend cannot serve on this machine, or an empty string."""
    if name == "cpu":
        return native.missing
    return triton.missing() if name == "triton" else ""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op called in this block, in this thread, by one backend.

    Args:
        name: "eager" (plain PyTorch: the oracle, any device, differentiable twice), "cpu" (the compiled kernels),
            "triton" (NVIDIA GPUs) or "auto" (the fastest that can serve). The environment variable LFCC_BACKEND
            sets the same for a process.

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
    home = {"cpu": "cpu", "triton": triton.DEVICE}.get(name, device.type)
    if device.type != home:
        raise ValueError(
            f"backend {name!r} was asked for by name, but the tensors are on {device}; "
            f"move them with .to({home!r}), or use_backend('auto')"
        )
    return name


def _fastest(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cpu" and not native.missing:
        return "cpu"
    # Triton multiplies float64 without tensor cores, which torch's own products use.
    if device.type == "cuda" and dtype != torch.float64 and not triton.missing():
        return "triton"
    return "eager"


def _check(name: str) -> None:
    reason = why_missing(name)
    if name in (AUTO, "eager", *WITH_KERNELS) and not reason:
        return
    reason = f" ({reason})" if reason else ""
    raise ValueError(
        f"backend {name!r} is not available{reason}; available are auto, {', '.join(available_backends())}"
    )
