"""Gloo processes with gathered negatives against one process that holds the whole batch."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import lfcc_kernels as lk

ROWS, DIM = 6, 10  # rows a rank
DIRECTIONS = ("student_to_teacher", "teacher_to_student", "symmetric")


def batch(world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (world_size * ROWS, DIM)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(4, shape[:1], generator=generator)


def contrast(direction: str, gather: str, student: Tensor, teacher: Tensor, ids: Tensor) -> list[Tensor]:
    """Loss and gradients of student, teacher and log-temperature."""
    loss_module = lk.InfoNCELoss(0.2, direction, learnable_temperature=True, gather=gather)
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss = loss_module(student, teacher, student_ids=ids, teacher_ids=ids)
    loss.backward()
    return [loss.detach(), student.grad, teacher.grad, loss_module.log_temperature.grad.double()]


def run_rank(rank: int, world_size: int, port: int, direction: str, gather: str, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    torch.save(contrast(direction, gather, *(x[mine] for x in batch(world_size))), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def over_ranks(world_size: int, direction: str, gather: str, folder) -> list[Tensor]:
    """What averaging over ranks, as DDP does, makes of every rank's loss and gradients."""
    port = 29500 + os.getpid() % 2000
    mp.spawn(run_rank, (world_size, port, direction, gather, str(folder)), nprocs=world_size)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]
    losses, students, teachers, temperatures = zip(*ranks, strict=True)
    # A row's gradient is spread over no other rank's tensor, so the mean over ranks is the row over their number.
    rows = [torch.cat(parts) / world_size for parts in (students, teachers)]
    return [torch.stack(losses).mean(), *rows, torch.stack(temperatures).mean()]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_equal_one_process(world_size, direction, tmp_path):
    expected = contrast(direction, "none", *batch(world_size))
    for got, want in zip(over_ranks(world_size, direction, "auto", tmp_path), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_without_gathering_negatives_stay_on_the_rank(tmp_path):
    expected = contrast("student_to_teacher", "none", *batch(2))
    got = over_ranks(2, "student_to_teacher", "none", tmp_path)
    assert abs(got[0] - expected[0]) > 1e-2
