"""Runs a function in several processes connected by gloo."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_ranks(size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of `function(*arguments)` in each of `size` processes; it must be importable."""
    mp.spawn(_rank, (size, folder, function, arguments), nprocs=size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, folder: Path, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=120), rank=rank, world_size=size)
    torch.save(function(*arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()
