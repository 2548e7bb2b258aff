"""Runs of several processes, as `torchrun` starts them: one per GPU.

All functions also work in a single process. Python values are exchanged over gloo if the process group has it, as that
of `distributed_context` does, so the host does not wait for a GPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def distributed_context(device: torch.device) -> Iterator[None]:
    """Initialise the process group of `torchrun`; does nothing if RANK and WORLD_SIZE are not set.

    Raises ConnectionError if another process ends or does not respond for ten minutes.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield
        return
    # nccl alone would send values of the host through the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        raise ConnectionError(
            f"rank {dist.get_rank()}: a peer process died or timed out; see its log. The files on disk are complete: "
            "restart all ranks (lfcc distill with --resume)"
        ) from error
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """The number of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_distributed() -> bool:
    """Whether there are several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this is rank 0, the process that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until all ranks call this."""
    if is_distributed():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, on every rank."""
    if not is_distributed():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def all_reduce_any(flag: bool) -> bool:
    """Whether `flag` is set on at least one rank."""
    return any(gather_objects(flag))


@torch.no_grad()
def broadcast_buffers(module: nn.Module) -> None:
    """Copy the buffers of rank 0, such as BatchNorm statistics, to every rank."""
    if is_distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def parallelize(
    distiller: nn.Module, student: nn.Module, average: nn.Module | None, *, shard: bool, compiled: bool
) -> nn.Module:
    """Wrap `distiller` in DDP, or shard it in place with FSDP2. Returns the module to train.

    With `shard`, the blocks of its `student` are sharded one by one, and `average`, the moving average of the student,
    in the same way. With `compiled`, modules are compiled first, since DDP and FSDP cannot be traced. Gradients are
    averaged over ranks. Raises ValueError for `shard` in a single process.
    """
    if shard and not is_distributed():
        raise ValueError("--fsdp needs several processes to shard over, but there is one: start them with torchrun")
    if compiled and not shard:
        distiller.compile()
    if not is_distributed():
        return distiller
    device = next(distiller.parameters()).device
    if not shard:
        device_ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(distiller, device_ids, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (world_size(),))
    for model in (student, average):
        for block in _blocks(model) if model is not None else ():
            if compiled:
                block.compile()
            fully_shard(block, mesh=mesh)
    if average is not None:
        fully_shard(average, mesh=mesh)
    fully_shard(distiller, mesh=mesh)
    return distiller


@contextmanager
def no_sync(module: nn.Module) -> Iterator[None]:
    """Accumulate gradients locally: for all batches of an update but the last."""
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


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The sequential blocks of a model: the children of its outermost Sequentials and ModuleLists."""
    if isinstance(model, nn.Sequential | nn.ModuleList):
        return [child for child in model if any(True for _ in child.parameters())]
    return [block for child in model.children() for block in _blocks(child)]
