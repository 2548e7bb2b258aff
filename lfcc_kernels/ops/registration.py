"""What both ops share: the library fragment, a short way to call, and the guard against a second derivative."""

from typing import Any

import torch
from torch import Tensor

from lfcc_kernels.backends import native

library = torch.library.Library("lfcc", "FRAGMENT")


def define(schemas: list[str]) -> None:
    """Define the ops in Python where the compiled library, which brings the same schemas, is not there."""
    if native.missing:
        for schema in schemas:
            library.define(schema)


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
