"""`lfcc::lowpass` and its two gradients: schema, fake, autograd and choice of backend.

x is a map (B, C, H, W) with an empty `grid`, or tokens (B, N, C) with `grid` = [H, W]. Filters come as a pair or not
at all. Arguments are checked in `lfcc_kernels.functional`; the kernels trust them.
"""

import torch
from torch import Tensor

from lfcc_kernels.backends import eager
from lfcc_kernels.ops.dispatch import select
from lfcc_kernels.ops.registration import call, define, first_order_only, op, register_autograd, register_fake

_FILTERS = "int[] scales, Tensor? row_filters, Tensor? col_filters, int[] grid, int prefix_tokens"
SCHEMAS = [
    f"lowpass(Tensor x, {_FILTERS}) -> Tensor",
    f"lowpass_input_grad(Tensor grad, SymInt[] size, bool channels_last, {_FILTERS}) -> Tensor",
    "lowpass_filter_grad(Tensor grad, Tensor x, int[] scales, Tensor row_filters, Tensor col_filters, int[] grid, "
    "int prefix_tokens) -> (Tensor, Tensor)",
]
define(SCHEMAS, "lowpass")


def lowpass(
    x: Tensor,
    scales: tuple[int, ...],
    row_filters: Tensor | None,
    col_filters: Tensor | None,
    grid: list[int],
    prefix_tokens: int,
) -> Tensor:
    """Run the op on the backend that serves; arguments as in the schema."""
    backend = select("lowpass", x.device, x.dtype, x.numel())
    if backend == "eager":
        return eager.lowpass(x, scales, row_filters, col_filters, grid, prefix_tokens)
    return call(op("lowpass", backend), x, scales, row_filters, col_filters, grid, prefix_tokens)


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are innermost in a 4-D map, as the gradient then is; decided by strides, as torch does."""
    return x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1 and x.stride(3) != 1


@register_fake("lowpass")
def _(x, scales, row_filters, col_filters, grid, prefix_tokens):
    channels = x.shape[2] if x.dim() == 3 else x.shape[1]
    return x.new_empty(x.shape[0], sum(s * s for s in scales), channels)


@register_fake("lowpass_input_grad")
def _(grad, size, channels_last, scales, row_filters, col_filters, grid, prefix_tokens):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout)


@register_fake("lowpass_filter_grad")
def _(grad, x, scales, row_filters, col_filters, grid, prefix_tokens):
    return row_filters.new_empty(row_filters.shape), col_filters.new_empty(col_filters.shape)


def _setup_context(ctx, inputs, output):
    x, ctx.scales, row_filters, col_filters, ctx.grid, ctx.prefix_tokens = inputs
    ctx.size, ctx.channels_last = x.shape, is_channels_last(x)
    # The op is linear in x: only the gradients of the filters read it again.
    filters_learn = row_filters is not None and (row_filters.requires_grad or col_filters.requires_grad)
    ctx.save_for_backward(x if filters_learn else None, row_filters, col_filters)


def _backward(backend, ctx, grad):
    x, row_filters, col_filters = ctx.saved_tensors
    grad_x = grad_rows = grad_cols = None
    inputs = [grad, x, row_filters, col_filters]
    with torch.no_grad():
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            grad_x = op("lowpass_input_grad", backend)(
                grad,
                ctx.size,
                ctx.channels_last,
                ctx.scales,
                row_filters,
                col_filters,
                ctx.grid,
                ctx.prefix_tokens,
            )
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            grad_rows, grad_cols = op("lowpass_filter_grad", backend)(
                grad, x, ctx.scales, row_filters, col_filters, ctx.grid, ctx.prefix_tokens
            )
    return (
        first_order_only(grad_x, inputs),
        None,
        first_order_only(grad_rows, inputs),
        first_order_only(grad_cols, inputs),
        None,
        None,
    )


register_autograd("lowpass", _setup_context, _backward)
