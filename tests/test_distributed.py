"""Gloo processes with gathered negatives against one process with the whole batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import in_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def distil(
    student: Tensor, teacher: Tensor, ids: Tensor, parallel: bool, compiled: bool = False, **options: Any
) -> list[Tensor]:
    """Loss of an LFCCLoss and gradients of its parameters, under DDP if `parallel`."""
    torch.manual_seed(1)
    module = lk.LFCCLoss([5], [5], scales=(1, 2), learnable_temperature=True, **options).double()
    if compiled:
        module.compile(backend="inductor", fullgraph=True)
    wrapped = nn.parallel.DistributedDataParallel(module) if parallel else module
    loss = wrapped([student], [teacher], ids)
    loss.backward()
    return [loss.detach(), *(p.grad for p in module.parameters())]


def project(student: Tensor, teacher: Tensor, parallel: bool, direction: str) -> list[Tensor]:
    """Gradients of a projection on each side, under one DDP if `parallel`."""
    torch.manual_seed(1)
    sides = nn.ModuleList([nn.Linear(10, 4, bias=False), nn.Linear(10, 4, bias=False)]).double()
    contrast = lk.InfoNCELoss(0.2, direction, gather="auto" if parallel else "none")

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sides = sides

        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return contrast(self.sides[0](student), self.sides[1](teacher))

    module = nn.parallel.DistributedDataParallel(Both()) if parallel else Both()
    module(student, teacher).backward()
    return [p.grad for p in sides.parameters()]


class Log(TorchDispatchMode):
    """Names of lfcc's ops and of collectives in call order; a gather with the width of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        namespace, name = op.name().split("::")
        if name == "gather_rows":
            self.calls.append(f"gather {args[0].shape[1]}")
        elif namespace in ("lfcc", "_c10d_functional"):
            self.calls.append(name)
        return op(*args, **(kwargs or {}))


def sent(maps: list[Tensor], direction: str) -> list[str]:
    with Log() as log, lk.use_backend("cpu"):
        distil(*maps, parallel=False, direction=direction)
    return log.calls


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def unlike(rank: int, rows: list[Tensor]) -> dict[str, str]:
    """The error of this rank if the last rank has other inputs than the others, by kind of difference."""
    student, teacher, ids = rows
    last = rank == dist.get_world_size() - 1
    contrast = lk.InfoNCELoss()
    fewer, narrow = slice(ROWS - 1 if last else ROWS), slice(9 if last else 10)
    some = {"student_ids": ids, "teacher_ids": ids} if last else {}
    compiled = torch.compile(contrast, backend="aot_eager", fullgraph=True)
    return {
        "rows": error_of(lambda: contrast(student[fewer], teacher[fewer])),
        "compiled rows": error_of(lambda: compiled(student[fewer], teacher[fewer])),
        "width": error_of(lambda: contrast(student[:, narrow], teacher[:, narrow])),
        "type": error_of(lambda: contrast(*(x.float() if last else x for x in (student, teacher)))),
        "ids": error_of(lambda: contrast(student, teacher, **some)),
        "none": error_of(lambda: contrast(student, teacher)),
    }


def run_rank() -> dict:
    import conftest  # noqa: F401  loads the emulated CUDA kernels in this process

    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    rows, maps = ([x[mine] for x in batch(world_size, *shape)] for shape in ((10,), (5, 4, 4)))
    results = {}
    for backend in backends(world_size):
        with lk.use_backend(backend):
            for direction in DIRECTIONS:
                results[backend, direction] = contrast(*rows, direction=direction)
                results[backend, direction, "LFCC"] = distil(*maps, parallel=True, direction=direction)
            results[backend, "group"] = contrast(*rows, gather=dist.group.WORLD)
            results[backend, "none"] = contrast(*rows, gather="none")
    for direction in DIRECTIONS:
        results[direction, "projections"] = project(*rows[:2], parallel=True, direction=direction)
        if "cpu" in lk.available_backends():
            results[direction, "sent"] = sent(maps, direction)
        if world_size == 2:
            results[direction, "compiled"] = distil(*maps, parallel=True, compiled=True, direction=direction)
    results["unlike"] = unlike(rank, rows)
    return results


def backends(world_size: int) -> tuple[str, ...]:
    """The interpreter and the emulation are slow, so they run on two ranks only."""
    return tuple(name for name in lk.available_backends() if world_size == 2 or name in ("eager", "cpu"))


@pytest.fixture(
    scope="module",
    params=[2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))],
    ids=["2 ranks", "3 ranks", "4 ranks"],
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The results of each rank."""
    return in_ranks(request.param, tmp_path_factory.mktemp("ranks"), run_rank)


def averaged(ranks: list[dict], *key: str) -> list[Tensor]:
    """The mean of losses and gradients over ranks, as in DDP.

    A row is on one rank only, so the mean of its gradient is that of its rank divided by the number of ranks.
    """
    losses, students, teachers, temperatures = zip(*(rank[key] for rank in ranks), strict=True)
    rows = [torch.cat(parts) / len(ranks) for parts in (students, teachers)]
    return [torch.stack(losses).mean(), *rows, torch.stack(temperatures).mean(0)]


def assert_all_have(results: list[list[Tensor]], expected: list[Tensor]) -> None:
    """Every rank's gradients, and the mean of their losses."""
    torch.testing.assert_close(torch.stack([loss for loss, *_ in results]).mean(), expected[0])
    for _, *grads in results:
        torch.testing.assert_close(grads, expected[1:], rtol=1e-6, atol=1e-9)


def skip_unless_run(ranks: list[dict], backend: str) -> None:
    if (backend, "none") not in ranks[0]:
        pytest.skip(f"{len(ranks)} ranks of {backend} would take minutes")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ranks_together_equal_one_process(ranks: list[dict], backend: str, direction: str) -> None:
    skip_unless_run(ranks, backend)
    expected = contrast(*batch(len(ranks), 10), direction=direction, gather="none")
    torch.testing.assert_close(averaged(ranks, backend, direction), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_whole_loss_under_ddp_equals_one_process(ranks: list[dict], backend: str, direction: str) -> None:
    skip_unless_run(ranks, backend)
    expected = distil(*batch(len(ranks), 5, 4, 4), parallel=False, direction=direction)
    assert_all_have([rank[backend, direction, "LFCC"] for rank in ranks], expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compiled_without_graph_breaks(ranks: list[dict], direction: str) -> None:
    if len(ranks) > 2:
        pytest.skip("compiled on two ranks only")
    expected = distil(*batch(len(ranks), 5, 4, 4), parallel=False, direction=direction)
    assert_all_have([rank[direction, "compiled"] for rank in ranks], expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_of_projections_of_both_sides_equal_one_process(ranks: list[dict], direction: str) -> None:
    expected = project(*batch(len(ranks), 10)[:2], parallel=False, direction=direction)
    for rank in ranks:
        torch.testing.assert_close(rank[direction, "projections"], expected, rtol=1e-6, atol=1e-9)


WIDTH = 5 * (1 + 4)  # of a row's pyramid


def test_student_to_teacher_sends_teacher_rows_while_the_student_is_pooled(
    ranks: list[dict], compiled_kernels: str
) -> None:
    for rank in ranks:
        calls = rank["student_to_teacher", "sent"]
        assert sorted(call for call in calls if "gather" in call) == ["gather 1", f"gather {WIDTH}"]  # of ids, of rows
        assert not any("reduce_scatter" in call for call in calls)
        of_teacher, of_student = (n for n, call in enumerate(calls) if call == "lowpass")
        assert of_teacher < calls.index(f"gather {WIDTH}") < of_student < calls.index("wait_tensor")


def test_teacher_to_student_sends_student_rows_once(ranks: list[dict], compiled_kernels: str) -> None:
    for rank in ranks:
        calls = rank["teacher_to_student", "sent"]
        assert sorted(call for call in calls if "gather" in call) == ["gather 1", f"gather {WIDTH}"]
        assert calls.count("reduce_scatter_tensor") == 1


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rows", "rank 0 has (6, 10) float64 without ids, rank {last} has (5, 10) float64 without ids"),
        ("compiled rows", "rank 0 has (6, 10) float64 without ids, rank {last} has (5, 10) float64 without ids"),
        ("width", "rank {last} has (6, 9) float64"),
        ("type", "rank {last} has (6, 10) float32"),
        ("ids", "rank {last} has (6, 10) float64 with ids"),
        ("none", "no error"),
    ],
)
def test_all_ranks_raise_if_ranks_differ(ranks: list[dict], what: str, message: str) -> None:
    for rank in ranks:
        assert message.format(last=len(ranks) - 1) in rank["unlike"][what]


def test_gather_in_a_given_group(ranks: list[dict], backend: str) -> None:
    skip_unless_run(ranks, backend)
    torch.testing.assert_close(averaged(ranks, backend, "group"), averaged(ranks, backend, DIRECTIONS[0]))


def test_without_gather_negatives_are_local(ranks: list[dict], backend: str) -> None:
    skip_unless_run(ranks, backend)
    rows = batch(len(ranks), 10)
    for number, rank in enumerate(ranks):
        mine = [x[number * ROWS : (number + 1) * ROWS] for x in rows]
        torch.testing.assert_close(rank[backend, "none"], contrast(*mine))
        assert rank[backend, "none"][0] < rank[backend, DIRECTIONS[0]][0] - 0.1
