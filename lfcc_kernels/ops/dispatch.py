"""Which backend serves a call: `use_backend` in code, LFCC_BACKEND in the environment, else `auto`."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lfcc_kernels.backends import native

AUTO = "auto"


class _Choice(threading.local):
    name = os.environ.get("LFCC_BACKEND", AUTO)


_choice = _Choice()


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can serve on this machine; "eager" always can."""
    return ("eager",) if native.missing else ("eager", "cpu")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op called in this block, in this thread, by one backend.

    Args:
        name: "eager" (plain PyTorch: the oracle, any device, differentiable twice), "cpu" (the compiled kernels) or
            "auto" (the fastest that can serve). The environment variable LFCC_BACKEND sets the same for a process.

    Raises:
        ValueError: the name is unknown, or the backend cannot serve on this machine, with the reason.
    """
    _check(name)
    previous, _choice.name = _choice.name, name
    try:
        yield
    finally:
        _choice.name = previous


def select(device: torch.device) -> str:
    """The backend that serves an op on tensors of `device`."""
    name = _choice.name
    if name == AUTO:
        return "cpu" if device.type == "cpu" and not native.missing else "eager"
    _check(name)
    if name == "cpu" and device.type != "cpu":
        raise ValueError(
            f"backend 'cpu' was asked for by name, but the tensors are on {device}; "
            "move them with .cpu(), or use_backend('auto')"
        )
    return name


def _check(name: str) -> None:
    if name == AUTO or name in available_backends():
        return
    reason = f" ({native.missing})" if name == "cpu" else ""
    raise ValueError(
        f"backend {name!r} is not available{reason}; available are auto, {', '.join(available_backends())}"
    )
