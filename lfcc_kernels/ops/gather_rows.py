"""`lfcc::gather_rows`: concatenates the rows of all ranks in rank order; its gradient is summed over ranks.

    gather_rows(rows (B, D), with_ids, wait, world_size, group) -> (world_size * B, D)

A collective over tensors of different sizes hangs or mixes rows up, so the ranks first compare shapes, dtypes and use
of ids. `torch.compile` sees one opaque op, so compiled code makes the same check. With `wait`, which autograd needs,
the result is complete; without it the transfer is still running when the op returns, and `wait_rows` completes it.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lfcc_kernels.backends.schemas import library

library.define("gather_rows(Tensor rows, bool with_ids, bool wait, int world_size, str group) -> Tensor")


def gather_rows(rows: Tensor, with_ids: bool, group: dist.ProcessGroup) -> Tensor:
    """Start to gather rows (B, D) of all ranks; read the result after `wait_rows`.

    `with_ids` tells the other ranks that this rank also gathers ids. Raises ValueError on every rank of `group` if
    B, D, dtype or `with_ids` differ between ranks.
    """
    wait = rows.requires_grad and torch.is_grad_enabled()
    return torch.ops.lfcc.gather_rows(rows, with_ids, wait, dist.get_world_size(group), group.group_name)


def wait_rows(rows: Tensor) -> Tensor:
    """The completed result of `gather_rows`. On a GPU the current stream waits, not the host."""
    return rows if rows.requires_grad else torch.ops._c10d_functional.wait_tensor(rows)


@torch.library.impl(library, "gather_rows", "CompositeExplicitAutograd")
def _(rows: Tensor, with_ids: bool, wait: bool, world_size: int, group: str) -> Tensor:
    process_group = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]  # a NewType of str
    _check_ranks_agree(rows, with_ids, process_group)
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(rows.contiguous(), world_size, group)
    return torch.ops._c10d_functional.wait_tensor(gathered) if wait else gathered


@torch.library.register_fake("lfcc::gather_rows", lib=library)
def _(rows, with_ids, wait, world_size, group):
    return rows.new_empty(world_size * rows.shape[0], rows.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, ctx.world_size, ctx.group = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    summed = torch.ops._c10d_functional.reduce_scatter_tensor(grad.contiguous(), "sum", ctx.world_size, ctx.group)
    return torch.ops._c10d_functional.wait_tensor(summed), None, None, None, None


torch.library.register_autograd("lfcc::gather_rows", _backward, setup_context=_setup_context, lib=library)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)


def _check_ranks_agree(rows: Tensor, with_ids: bool, group: dist.ProcessGroup) -> None:
    """Raises ValueError on every rank if any two ranks differ."""
    header = [*rows.shape, _DTYPES.index(rows.dtype), int(with_ids)]
    headers = _gather_ints(header, rows.device, group)
    for rank, other in enumerate(headers):
        if other != headers[0]:
            raise ValueError(
                f"lfcc_kernels: the rows to gather differ between ranks: rank 0 has {_describe(*headers[0])}, "
                f"rank {rank} has {_describe(*other)}; expected one shape, dtype and use of ids on every rank "
                "(drop the last, smaller batch with drop_last=True)"
            )


def _describe(rows: int, width: int, dtype: int, with_ids: int) -> str:
    name = str(_DTYPES[dtype]).removeprefix("torch.")
    return f"({rows}, {width}) {name} {'with' if with_ids else 'without'} ids"


def _gather_ints(numbers: list[int], device: torch.device, group: dist.ProcessGroup) -> list[list[int]]:
    """The numbers of each rank."""
    if _has_cpu_backend(group):
        device = torch.device("cpu")
    # On its own stream, because reading the result would otherwise wait for the forward pass queued on the current one.
    stream: AbstractContextManager[Any] = nullcontext()
    if device.type != "cpu":
        stream = torch.cuda.stream(torch.cuda.Stream(device))
    with stream:
        own = torch.tensor(numbers, device=device)
        ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, own, group=group)
        return torch.stack(ranks).tolist()


@functools.lru_cache
def _has_cpu_backend(group: dist.ProcessGroup) -> bool:
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return False
    return True
