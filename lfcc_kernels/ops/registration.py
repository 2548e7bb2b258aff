"""Registration of fakes and autograd formulas, calls of an op's overload, and the guard against double backward.

Used by the modules of this folder. The schemas are in `lfcc_kernels.backends.schemas`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lfcc_kernels.backends.schemas import BACKENDS, OVERLOADS, library, qualified


def register_fake(name: str) -> Callable[[Callable[..., Any]], None]:
    """Decorator for the function that gives shape, dtype and layout of an op's results, for every overload."""

    def register(fake: Callable[..., Any]) -> None:
        for backend in BACKENDS[name]:
            torch.library.register_fake(qualified(name, backend), fake, lib=library)

    return register


def register_autograd(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register the derivative of an op for every overload; `backward` gets the backend's name before its ctx."""
    for backend in BACKENDS[name]:
        torch.library.register_autograd(
            qualified(name, backend), functools.partial(backward, backend), setup_context=setup_context, lib=library
        )


def op(name: str, backend: str) -> torch._ops.OpOverload:
    """The overload of an op that `backend` implements."""
    return getattr(getattr(torch.ops.lfcc, name), OVERLOADS[backend])


def call(op: torch._ops.OpOverload, *arguments: Any) -> Any:
    """Call an op, skipping the autograd wrapper in no-grad mode (saves a third of a small call)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


class OnceDifferentiable(torch.autograd.Function):
    """Identity on a gradient that ties it to the inputs it depends on and raises in its own backward pass.

    Otherwise double backward would silently drop terms.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            "lfcc_kernels: the fused kernels have no second derivative; "
            "run the forward pass under lfcc_kernels.use_backend('eager'), which has one"
        )


def once_differentiable(gradient: Tensor | None, inputs: list[Tensor | None]) -> Tensor | None:
    """`gradient`, guarded if the backward pass itself is being recorded (create_graph=True)."""
    if gradient is None or not torch.is_grad_enabled():
        return gradient
    return OnceDifferentiable.apply(gradient, *(x for x in inputs if x is not None and x.requires_grad))
