"""The processes of one run, as `torchrun` starts them: one a GPU, or one alone.

Everything here also works in a process that has joined no others. Plain values travel over gloo where the process group
has it, as that of `joined`, so the host does not wait for a GPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes that `torchrun` started with this one; without its RANK and WORLD_SIZE it stays alone.

    Raises ConnectionError where one of them ends, or does not answer for ten minutes.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield
        return
    # nccl alone would send the host's values through the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        raise ConnectionError(
            f"rank {dist.get_rank()}: another process has ended or does not answer, and says why itself; what is on "
            "disk is whole: start all of them again, lfcc distill with --resume"
        ) from error
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """This process's number on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def joined_others() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if joined_others() else 0


def world_size() -> int:
    return dist.get_world_size() if joined_others() else 1


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until all ranks are here."""
    if joined_others():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """The value of each rank, on every rank."""
    if not joined_others():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """The main rank's value, on every rank."""
    if not joined_others():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on one rank at least."""
    return any(gather_objects(flag))
