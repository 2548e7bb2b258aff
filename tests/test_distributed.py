"""Gloo processes with gathered negatives against one process that holds the whole batch."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import lfcc_kernels as lk

ROWS = 6  # on each rank
DIRECTIONS = ["student_to_teacher", "teacher_to_student", "symmetric"]


def batch(world_size: int, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and ids of all ranks together."""
    torch.manual_seed(0)
    size = (2, world_size * ROWS, *shape)
    return *torch.randn(size, dtype=torch.float64).unbind(0), torch.randint(4, size[1:2])


def contrast(student: Tensor, teacher: Tensor, ids: Tensor, **options: Any) -> list[Tensor]:
    """Loss and gradients of student, teacher and log-temperature."""
    loss_module = lk.InfoNCELoss(0.2, learnable_temperature=True, **options)
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss = loss_module(student, teacher, student_ids=ids, teacher_ids=ids)
    loss.backward()
    return [loss.detach(), student.grad, teacher.grad, loss_module.log_temperature.grad.double()]


def distil(student: Tensor, teacher: Tensor, ids: Tensor, parallel: bool, **options: Any) -> list[Tensor]:
    """Loss of a whole LFCCLoss and gradients of its parameters, under DDP where `parallel`."""
    torch.manual_seed(1)
    module = lk.LFCCLoss([5], [5], scales=(1, 2), learnable_temperature=True, **options).double()
    wrapped = nn.parallel.DistributedDataParallel(module) if parallel else module
    loss = wrapped([student], [teacher], ids)
    loss.backward()
    return [loss.detach(), *(p.grad for p in module.parameters())]


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    import conftest  # noqa: F401  a fresh process has no kernels that are compiled for the CPU

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=120), rank=rank, world_size=world_size)
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    rows, maps = ([x[mine] for x in batch(world_size, *shape)] for shape in ((10,), (5, 4, 4)))
    results = {}
    for backend in lk.available_backends():
        with lk.use_backend(backend):
            for direction in DIRECTIONS:
                results[backend, direction] = contrast(*rows, direction=direction)
                results[backend, direction, "LFCC"] = distil(*maps, parallel=True, direction=direction)
            results[backend, "group"] = contrast(*rows, gather=dist.group.WORLD)
            results[backend, "none"] = contrast(*rows, gather="none")
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3, 4], ids=["2 ranks", "3 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (request.param, folder), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def averaged(ranks: list[dict], *key: str) -> list[Tensor]:
    """The mean of losses and of gradients over ranks, as DDP makes it.

    A row lives on one rank only, so the mean over ranks of its gradient is that rank's over their number.
    """
    losses, students, teachers, temperatures = zip(*(rank[key] for rank in ranks), strict=True)
    rows = [torch.cat(parts) / len(ranks) for parts in (students, teachers)]
    return [torch.stack(losses).mean(), *rows, torch.stack(temperatures).mean()]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ranks_together_equal_one_process(ranks: list[dict], backend: str, direction: str) -> None:
    expected = contrast(*batch(len(ranks), 10), direction=direction, gather="none")
    torch.testing.assert_close(averaged(ranks, backend, direction), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_whole_loss_under_ddp_equals_one_process(ranks: list[dict], backend: str, direction: str) -> None:
    expected = distil(*batch(len(ranks), 5, 4, 4), parallel=False, direction=direction)
    results = [rank[backend, direction, "LFCC"] for rank in ranks]
    torch.testing.assert_close(torch.stack([loss for loss, *_ in results]).mean(), expected[0])
    for _, *grads in results:
        torch.testing.assert_close(grads, expected[1:], rtol=1e-6, atol=1e-9)


def test_a_group_by_name_is_gathered(ranks: list[dict], backend: str) -> None:
    torch.testing.assert_close(averaged(ranks, backend, "group"), averaged(ranks, backend, DIRECTIONS[0]))


def test_without_gathering_negatives_stay_on_the_rank(ranks: list[dict], backend: str) -> None:
    rows = batch(len(ranks), 10)
    for number, rank in enumerate(ranks):
        mine = [x[number * ROWS : (number + 1) * ROWS] for x in rows]
        torch.testing.assert_close(rank[backend, "none"], contrast(*mine))
        assert rank[backend, "none"][0] < rank[backend, DIRECTIONS[0]][0] - 0.1
