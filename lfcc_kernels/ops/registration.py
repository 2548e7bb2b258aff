"""What both ops share: the library fragment, an overload a backend, a short way to call, and the guard against a
second derivative.

Every op has an overload of one schema for each backend: `default` and `cuda`, which the compiled library serves, and
`triton`. So the choice of backend is part of a graph, and the backward pass, which may run in another thread, stays
with it.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lfcc_kernels.backends import native

library = torch.library.Library("lfcc", "FRAGMENT")


# Which overload, named as in a schema, serves a backend.
OVERLOADS = {"cpu": "", "triton": ".triton", "cuda": ".cuda"}


def define(schemas: list[str], module: str, backends: Sequence[str] = tuple(OVERLOADS)) -> None:
    """Define the overloads that the compiled library does not bring; `module` has the functions behind Triton's."""
    for schema in schemas:
        name, arguments = schema.split("(", 1)
        if native.missing and "cpu" in backends:
            library.define(schema)
        if "cuda" in backends:
            library.define(f"{name}.cuda({arguments}")
        if "triton" in backends:
            library.define(f"{name}.triton({arguments}")
            for key in ("CPU", "CUDA"):
                library.impl(f"{name}.triton", _lazily(f"lfcc_kernels.backends.triton.{module}", name), key)


def _lazily(module: str, name: str) -> Callable:
    """The function of that name, whose module, and Triton with it, is imported with the first call."""
    return lambda *arguments: getattr(importlib.import_module(module), name)(*arguments)


def register_fake(name: str, backends: Sequence[str] = tuple(OVERLOADS)) -> Callable[[Callable], None]:
    """Decorates a function that gives shape, type and layout of an op's results, for these backends' overloads."""

    def register(fake: Callable) -> None:
        for backend in backends:
            torch.library.register_fake(f"lfcc::{name}{OVERLOADS[backend]}", fake, lib=library)

    return register


def register_autograd(
    name: str, setup_context: Callable, backward: Callable, backends: Sequence[str] = tuple(OVERLOADS)
) -> None:
    """Derivative of an op for these backends' overloads; `backward` gets the backend's name before its ctx."""
    for backend in backends:
        torch.library.register_autograd(
            f"lfcc::{name}{OVERLOADS[backend]}",
            functools.partial(backward, backend),
            setup_context=setup_context,
            lib=library,
        )


def op(name: str, backend: str) -> torch._ops.OpOverload:
    """The overload of an op that `backend` serves."""
    return getattr(getattr(torch.ops.lfcc, name), OVERLOADS[backend].removeprefix(".") or "default")


def call(op: torch._ops.OpOverload, *arguments: Any) -> Any:
    """The op's result; where no graph is recorded, without the Python of its autograd, a third of a small call."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


class FirstOrderOnly(torch.autograd.Function):
    """Identity on a gradient; ties it to the inputs it depends on, so that differentiating it again is an error.

    Without the tie a second derivative would leave out terms without a word.
    """

    @staticmethod
    def forward(ctx, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        raise RuntimeError(
            "lfcc_kernels: the compiled kernels have no second derivative; "
            "run the forward pass under lfcc_kernels.use_backend('eager'), which has one"
        )


def first_order_only(gradient: Tensor | None, inputs: list[Tensor | None]) -> Tensor | None:
    """`gradient`, guarded where a graph of the backward pass is being recorded (create_graph=True)."""
    if gradient is None or not torch.is_grad_enabled():
        return gradient
    return FirstOrderOnly.apply(gradient, *(x for x in inputs if x is not None and x.requires_grad))
