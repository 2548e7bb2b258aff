"""The benchmark's ranks against one process with the rows of all."""

import multiprocessing
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lfcc_kernels.bench import ranks
from lfcc_kernels.bench.cases.base import rows
from lfcc_kernels.bench.machine import Cpu

SIZE, ROWS, TEMPERATURE = 2, 6, 0.2
make_rows = partial(rows, Cpu(), (ROWS, 10), True, torch.float64)


def only_with_one_rank(student: Tensor, teacher: Tensor) -> Tensor:
    if dist.get_rank() > 0:
        raise ArithmeticError("none here")
    return student.sum()


def die_with_one_rank(student: Tensor, teacher: Tensor) -> Tensor:
    if dist.get_rank() > 0:
        os._exit(1)
    return student.sum()


def call(world: ranks.World) -> list[Path]:
    """The processes of the other ranks after one call."""
    world.candidate(partial(ranks.lfcc, temperature=TEMPERATURE))(*make_rows())
    world.wait()
    return [Path(f"/proc/{child.pid}") for child in multiprocessing.active_children()]


@pytest.fixture(scope="module")
def world() -> Iterator[ranks.World]:
    world = ranks.World(torch.device("cpu"), SIZE, make_rows)
    yield world
    world.close()


@pytest.mark.parametrize("loss", [ranks.lfcc, ranks.eager, ranks.linear_cross_entropy])
def test_loss_and_gradient_are_those_of_one_process(world: ranks.World, loss: ranks.Loss) -> None:
    students, teachers = [], []
    for rank in range(SIZE):
        torch.manual_seed(rank)
        student, teacher = make_rows()
        students.append(student)
        teachers.append(teacher)
    logits = F.normalize(torch.cat(students)) @ F.normalize(torch.cat(teachers)).t() / TEMPERATURE
    expected = F.cross_entropy(logits, torch.arange(SIZE * ROWS), reduction="none")[:ROWS].mean()
    result = world.candidate(partial(loss, temperature=TEMPERATURE))(students[0], teachers[0])
    torch.testing.assert_close(result, expected)
    gradients = [torch.autograd.grad(x, students[0]) for x in (result, expected)]
    torch.testing.assert_close(*gradients)
    world.wait()


def test_failure_of_another_rank_raises_and_the_next_call_works(world: ranks.World) -> None:
    world.candidate(only_with_one_rank)(*make_rows())
    with pytest.raises(RuntimeError, match="rank 1: ArithmeticError: none here"):
        world.wait()
    call(world)


def test_nothing_is_left_after_close(world: ranks.World) -> None:
    processes = call(world)
    assert [path.exists() for path in processes] == [True] * (SIZE - 1)
    assert dist.is_initialized()
    world.close()
    assert not any(path.exists() for path in processes)
    assert not dist.is_initialized()
    world.close()  # does nothing


def test_nothing_is_left_after_a_rank_has_ended(world: ranks.World) -> None:
    world.close()
    torch.set_num_threads(2)
    processes = call(world)
    assert torch.get_num_threads() == 1
    world.candidate(die_with_one_rank)(*make_rows())
    with pytest.raises(RuntimeError, match="rank 1 of 2 ended"):
        world.wait()
    assert not any(path.exists() for path in processes)
    assert not dist.is_initialized()
    assert torch.get_num_threads() == 2


def test_fewer_gpus_than_ranks_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(NotImplementedError, match="2 ranks need one GPU each, found 1"):
        ranks.World(torch.device("cuda"), 2, make_rows).candidate(ranks.lfcc)(torch.ones(2, 3), torch.ones(2, 3))
