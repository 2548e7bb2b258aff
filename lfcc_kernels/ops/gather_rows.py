"""`lfcc::gather_rows`: the rows of all ranks, in rank order; its gradient is summed over ranks.

    gather_rows(rows (B, D), with_ids, wait, world_size, group) -> (world_size * B, D)

First the ranks tell each other what they bring, since a collective of tensors that differ hangs or mixes rows up. The
op is opaque to `torch.compile`, so compiled code is as safe. Without `wait`, which a gradient needs, the rows are still
travelling when the op returns; `arrived` waits for them.
"""

import functools
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from lfcc_kernels.ops.registration import library

library.define("gather_rows(Tensor rows, bool with_ids, bool wait, int world_size, str group) -> Tensor")


def gather_rows(rows: Tensor, with_ids: bool, group: dist.ProcessGroup) -> Tensor:
    """The rows (B, D) of all ranks, to be read after `arrived`; `with_ids` says whether ids travel beside them.

    Raises ValueError on every rank of `group` where ranks differ in B, D, dtype or `with_ids`.
    """
    wait = rows.requires_grad and torch.is_grad_enabled()
    return torch.ops.lfcc.gather_rows(rows, with_ids, wait, dist.get_world_size(group), group.group_name)


def arrived(rows: Tensor) -> Tensor:
    """The result of `gather_rows` when it is there; a GPU's stream waits, the host does not."""
    return rows if rows.requires_grad else torch.ops._c10d_functional.wait_tensor(rows)


@torch.library.impl(library, "gather_rows", "CompositeExplicitAutograd")
def _(rows, with_ids, wait, world_size, group):
    _agree(rows, with_ids, dist.distributed_c10d._resolve_process_group(group))
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(rows.contiguous(), world_size, group)
    return torch.ops._c10d_functional.wait_tensor(gathered) if wait else gathered


@torch.library.register_fake("lfcc::gather_rows", lib=library)
def _(rows, with_ids, wait, world_size, group):
    return rows.new_empty(world_size * rows.shape[0], rows.shape[1])


def _setup_context(ctx, inputs, output):
    *_, ctx.world_size, ctx.group = inputs


def _backward(ctx, grad):
    summed = torch.ops._c10d_functional.reduce_scatter_tensor(grad.contiguous(), "sum", ctx.world_size, ctx.group)
    return torch.ops._c10d_functional.wait_tensor(summed), None, None, None, None


torch.library.register_autograd("lfcc::gather_rows", _backward, setup_context=_setup_context, lib=library)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)


def _agree(rows: Tensor, with_ids: bool, group: dist.ProcessGroup) -> None:
    """Raises ValueError on every rank where ranks differ."""
    mine = [*rows.shape, _DTYPES.index(rows.dtype), int(with_ids)]
    ranks = _exchange(mine, rows.device, group)
    for rank, theirs in enumerate(ranks):
        if theirs != ranks[0]:
            raise ValueError(
                f"the ranks contrast different rows: rank 0 brings {_in_words(*ranks[0])}, rank {rank} "
                f"{_in_words(*theirs)}; every rank needs the same, so drop the last, smaller batch (drop_last=True)"
            )


def _in_words(rows: int, width: int, dtype: int, with_ids: int) -> str:
    name = str(_DTYPES[dtype]).removeprefix("torch.")
    return f"{rows} rows of {width} {name} values {'with' if with_ids else 'without'} ids"


def _exchange(numbers: list[int], device: torch.device, group: dist.ProcessGroup) -> list[list[int]]:
    """The numbers of each rank."""
    if _talks_on_cpu(group):
        device = torch.device("cpu")
    # On a stream of its own, so that reading the answer does not wait for the forward pass that is queued.
    stream = nullcontext() if device.type == "cpu" else torch.cuda.stream(torch.cuda.Stream(device))
    with stream:
        mine = torch.tensor(numbers, device=device)
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, mine, group=group)
        return torch.stack(ranks).tolist()


@functools.lru_cache
def _talks_on_cpu(group: dist.ProcessGroup) -> bool:
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return False
    return True
