"""What trains on many ranks: the distiller in DDP, or sharded by FSDP2. One rank alone needs neither."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from .distiller import Distiller
from .ranks import joined_others, world_size


def parallelize(distiller: Distiller, average: nn.Module | None, *, shard: bool, compiled: bool) -> nn.Module:
    """The module whose `forward` trains `distiller`, in place; `average` of the student is sharded like it.

    The gradient is the mean over ranks. Compiling comes first, since DDP and FSDP are not to be traced. Raises
    ValueError for `shard` on one rank alone.
    """
    if shard and not joined_others():
        raise ValueError("there is one process, so --fsdp has nothing to shard over: start several with torchrun")
    if compiled and not shard:
        distiller.compile()
    if not joined_others():
        return distiller
    device = next(distiller.parameters()).device
    if not shard:
        on_gpu = {"device_ids": [device]} if device.type == "cuda" else {}
        return DistributedDataParallel(distiller, gradient_as_bucket_view=True, **on_gpu)
    mesh = init_device_mesh(device.type, (world_size(),))
    for model in (distiller.student.model, average):
        for block in _blocks(model) if model is not None else ():
            if compiled:
                block.compile()
            fully_shard(block, mesh=mesh)
    if average is not None:
        fully_shard(average, mesh=mesh)
    return fully_shard(distiller, mesh=mesh)


@contextmanager
def no_sync(module: nn.Module) -> Iterator[None]:
    """Let gradients add up on each rank, for all batches of an update but the last."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    elif isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Give every rank the main rank's buffers, such as the statistics of BatchNorm."""
    if joined_others():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What a model calls one after the other: the children of its outermost sequences."""
    if isinstance(model, nn.Sequential | nn.ModuleList):
        return [child for child in model if any(True for _ in child.parameters())]
    return [block for child in model.children() for block in _blocks(child)]
