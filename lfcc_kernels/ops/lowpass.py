"""`lfcc::lowpass`, its gradients and its list form: fakes, autograd formulas and choice of backend.

x is a map (B, C, H, W) with an empty `grid`, or tokens (B, N, C) with `grid` = [H, W]. Filters are given as a pair or
not at all. `lfcc_kernels.functional` validates the arguments; the kernels trust them.

`lfcc::lowpass_foreach` takes a list of maps: one launch for all stages of a loss, because the last blocks of one launch
per stage leave half of a GPU idle. Only the CUDA kernels implement it. Its filters are lists as long as the list of
maps, or empty for the average; `grids` has two numbers per map, both 0 if the map is not tokens.
"""

import torch
from torch import Tensor

from lfcc_kernels.backends import eager
from lfcc_kernels.backends.schemas import BACKENDS
from lfcc_kernels.ops.dispatch import select
from lfcc_kernels.ops.registration import call, once_differentiable, op, register_autograd, register_fake


def lowpass(
    x: Tensor,
    scales: tuple[int, ...],
    row_filters: Tensor | None,
    col_filters: Tensor | None,
    grid: list[int],
    prefix_tokens: int,
) -> Tensor:
    """Run the op on the selected backend. Arguments as in the schema."""
    backend = select("lowpass", x.device, x.dtype, x.numel())
    if backend == "eager":
        return eager.lowpass(x, scales, row_filters, col_filters, grid, prefix_tokens)
    return call(op("lowpass", backend), x, scales, row_filters, col_filters, grid, prefix_tokens)


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are innermost in a 4-D map, judged by strides as in torch. Its gradient has the same layout."""
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
    # The op is linear in x, so only the gradients of the filters need it.
    filters_require_grad = row_filters is not None and (row_filters.requires_grad or col_filters.requires_grad)
    ctx.save_for_backward(x if filters_require_grad else None, row_filters, col_filters)


def _backward(backend, ctx, grad):
    x, row_filters, col_filters = ctx.saved_tensors
    grad_x = grad_rows = grad_cols = None
    inputs = [grad, x, row_filters, col_filters]
    with torch.no_grad():
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            grad_x = op("lowpass_input_grad", backend)(
                grad, ctx.size, ctx.channels_last, ctx.scales, row_filters, col_filters, ctx.grid, ctx.prefix_tokens
            )
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            grad_rows, grad_cols = op("lowpass_filter_grad", backend)(
                grad, x, ctx.scales, row_filters, col_filters, ctx.grid, ctx.prefix_tokens
            )
    return (
        once_differentiable(grad_x, inputs),
        None,
        once_differentiable(grad_rows, inputs),
        once_differentiable(grad_cols, inputs),
        None,
        None,
    )


register_autograd("lowpass", _setup_context, _backward)


def lowpass_foreach(
    maps: list[Tensor],
    scales: tuple[int, ...],
    row_filters: list[Tensor],
    col_filters: list[Tensor],
    grids: list[list[int]],
    prefix_tokens: list[int],
) -> list[Tensor]:
    """The pyramids of all maps: one op if the selected backend has a list form, otherwise one op per map."""
    first = maps[0]
    backend = select("lowpass", first.device, first.dtype, sum(x.numel() for x in maps))
    if backend in BACKENDS["lowpass_foreach"] and len(maps) > 1 and all(x.dtype == first.dtype for x in maps):
        flat_grids = [size for grid in grids for size in grid or (0, 0)]
        return call(op("lowpass_foreach", backend), maps, scales, row_filters, col_filters, flat_grids, prefix_tokens)
    none = [None] * len(maps)
    arguments = zip(maps, row_filters or none, col_filters or none, grids, prefix_tokens, strict=True)
    return [lowpass(x, scales, rows, cols, grid, prefix) for x, rows, cols, grid, prefix in arguments]


@register_fake("lowpass_foreach")
def _(maps, scales, row_filters, col_filters, grids, prefix_tokens):
    cells = sum(s * s for s in scales)
    return [x.new_empty(x.shape[0], cells, x.shape[2] if x.dim() == 3 else x.shape[1]) for x in maps]


@register_fake("lowpass_foreach_input_grad")
def _(grads, sizes, channels_last, scales, row_filters, col_filters, grids, prefix_tokens):
    results, sizes = [], list(sizes)
    for n, grad in enumerate(grads):
        size = [sizes.pop(0) for _ in range(3 if grids[2 * n] else 4)]
        layout = torch.channels_last if channels_last[n] else torch.contiguous_format
        results.append(torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout))
    return results


def _setup_foreach(ctx, inputs, output):
    maps, ctx.scales, row_filters, col_filters, ctx.grids, ctx.prefix_tokens = inputs
    ctx.sizes = [size for x in maps for size in x.shape]
    ctx.channels_last = [int(is_channels_last(x)) for x in maps]
    filters_require_grad = any(matrix.requires_grad for matrix in [*row_filters, *col_filters])
    ctx.maps, ctx.filters = len(maps), len(row_filters)
    ctx.save_for_backward(*row_filters, *col_filters, *(maps if filters_require_grad else []))


def _backward_foreach(backend, ctx, grads):
    saved, count = list(ctx.saved_tensors), ctx.filters
    row_filters, col_filters, maps = saved[:count], saved[count : 2 * count], saved[2 * count :]
    inputs = [*grads, *saved]
    grad_maps, grad_rows, grad_cols = [None] * ctx.maps, [None] * count, [None] * count
    with torch.no_grad():
        grads = [grad.contiguous() for grad in grads]
        if any(ctx.needs_input_grad[0]):
            grad_maps = op("lowpass_foreach_input_grad", backend)(
                grads, ctx.sizes, ctx.channels_last, ctx.scales, row_filters, col_filters, ctx.grids, ctx.prefix_tokens
            )
        for n, x in enumerate(maps):
            if ctx.needs_input_grad[2][n] or ctx.needs_input_grad[3][n]:
                grid = ctx.grids[2 * n : 2 * n + 2]
                grad_rows[n], grad_cols[n] = op("lowpass_filter_grad", backend)(
                    grads[n], x, ctx.scales, row_filters[n], col_filters[n], grid if grid[0] else [],
                    ctx.prefix_tokens[n],
                )  # fmt: skip
    of_maps, of_rows, of_cols = (
        [once_differentiable(gradient, inputs) for gradient in gradients]
        for gradients in (grad_maps, grad_rows, grad_cols)
    )
    return of_maps, None, of_rows, of_cols, None, None


register_autograd("lowpass_foreach", _setup_foreach, _backward_foreach)
