"""`lfcc::lowpass_group`: the pyramids of many maps with the same scales in one launch, and their gradients in another.

Only the CUDA kernels have it: there the maps of all stages of a loss are one queue of work, where each by itself leaves
a GPU half idle at its end. Filters are lists as long as that of the maps, or empty for the average; `grids` has two
numbers a map, both 0 for one that is no tokens.
"""

import torch
from torch import Tensor

from lfcc_kernels.ops.dispatch import select
from lfcc_kernels.ops.lowpass import is_channels_last, lowpass
from lfcc_kernels.ops.registration import call, define, first_order_only, op, register_autograd, register_fake

BACKENDS = ("cuda",)
_FILTERS = "int[] scales, Tensor[] row_filters, Tensor[] col_filters, int[] grids, int[] prefix_tokens"
SCHEMAS = [
    f"lowpass_group(Tensor[] maps, {_FILTERS}) -> Tensor[]",
    f"lowpass_group_input_grad(Tensor[] grads, SymInt[] sizes, int[] channels_last, {_FILTERS}) -> Tensor[]",
]
define(SCHEMAS, "lowpass_group", BACKENDS)


def lowpass_group(
    maps: list[Tensor],
    scales: tuple[int, ...],
    row_filters: list[Tensor],
    col_filters: list[Tensor],
    grids: list[list[int]],
    prefix_tokens: list[int],
) -> list[Tensor]:
    """The pyramid of each map: at once where a backend can, else one after the other."""
    first = maps[0]
    backend = select("lowpass", first.device, first.dtype, sum(x.numel() for x in maps))
    if backend in BACKENDS and len(maps) > 1 and all(x.dtype == first.dtype for x in maps):
        numbers = [number for grid in grids for number in grid or (0, 0)]
        return list(call(op("lowpass_group", backend), maps, scales, row_filters, col_filters, numbers, prefix_tokens))
    none = [None] * len(maps)
    arguments = zip(maps, row_filters or none, col_filters or none, grids, prefix_tokens, strict=True)
    return [lowpass(x, scales, rows, cols, grid, prefix) for x, rows, cols, grid, prefix in arguments]


@register_fake("lowpass_group", BACKENDS)
def _(maps, scales, row_filters, col_filters, grids, prefix_tokens):
    cells = sum(s * s for s in scales)
    return [x.new_empty(x.shape[0], cells, x.shape[2] if x.dim() == 3 else x.shape[1]) for x in maps]


@register_fake("lowpass_group_input_grad", BACKENDS)
def _(grads, sizes, channels_last, scales, row_filters, col_filters, grids, prefix_tokens):
    results, sizes = [], list(sizes)
    for n, grad in enumerate(grads):
        size = [sizes.pop(0) for _ in range(3 if grids[2 * n] else 4)]
        layout = torch.channels_last if channels_last[n] else torch.contiguous_format
        results.append(torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout))
    return results


def _setup_context(ctx, inputs, output):
    maps, ctx.scales, row_filters, col_filters, ctx.grids, ctx.prefix_tokens = inputs
    ctx.sizes = [size for x in maps for size in x.shape]
    ctx.channels_last = [int(is_channels_last(x)) for x in maps]
    filters_learn = any(matrix.requires_grad for matrix in [*row_filters, *col_filters])
    ctx.maps, ctx.filters = len(maps), len(row_filters)
    ctx.save_for_backward(*row_filters, *col_filters, *(maps if filters_learn else []))


def _backward(backend, ctx, grads):
    saved, count = list(ctx.saved_tensors), ctx.filters
    row_filters, col_filters, maps = saved[:count], saved[count : 2 * count], saved[2 * count :]
    inputs = [*grads, *saved]
    to_maps, to_rows, to_cols = [None] * ctx.maps, [None] * count, [None] * count
    with torch.no_grad():
        grads = [grad.contiguous() for grad in grads]
        if any(ctx.needs_input_grad[0]):
            to_maps = op("lowpass_group_input_grad", backend)(
                grads, ctx.sizes, ctx.channels_last, ctx.scales, row_filters, col_filters, ctx.grids, ctx.prefix_tokens
            )
        for n, x in enumerate(maps):
            if ctx.needs_input_grad[2][n] or ctx.needs_input_grad[3][n]:
                grid = ctx.grids[2 * n : 2 * n + 2]
                to_rows[n], to_cols[n] = op("lowpass_filter_grad", backend)(
                    grads[n], x, ctx.scales, row_filters[n], col_filters[n], grid if grid[0] else [],
                    ctx.prefix_tokens[n],
                )  # fmt: skip
    to_maps, to_rows, to_cols = (
        [first_order_only(gradient, inputs) for gradient in gradients] for gradients in (to_maps, to_rows, to_cols)
    )
    return to_maps, None, to_rows, to_cols, None, None


register_autograd("lowpass_group", _setup_context, _backward, BACKENDS)
