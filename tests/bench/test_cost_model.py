"""The formulas of the cost model against tensors: memory in use, bytes sent between gloo processes, FLOPs."""

import contextlib
import itertools
import re
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gloo import in_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import lfcc_kernels as lk
from lfcc_kernels.bench import cost_model
from lfcc_kernels.bench.cost_model import Run, cost_per_image, cost_per_run
from lfcc_kernels.bench.ofa import MODELS
from lfcc_kernels.functional import info_nce_foreach

timm = pytest.importorskip("timm")
from lfcc_kernels.distill import Distiller  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
ROWS = 24  # of a rank in an update
DIRECTIONS = ("student_to_teacher", "teacher_to_student", "symmetric")


class Alive(TorchDispatchMode):
    """Bytes of live tensors, at their peak by the op that created them; FLOPs of lfcc's ops; gradients sent."""

    def __init__(self, others: list[Tensor]) -> None:
        super().__init__()
        self.others = {
            x.untyped_storage()._cdata: x for x in others
        }  # a reference, so that their addresses stay unique
        self.alive: dict[int, tuple[str, int]] = {}
        self.flops = self.peak = self.message = 0
        self.shapes: set[tuple[int, ...]] = set()
        self.received = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name()
        if name.startswith("lfcc::info_nce"):
            rows, keys = args[1:3] if "grad" in name else args[:2]
            self.flops += FLOPS[name] * len(rows) * keys.numel()
        results = op(*args, **(kwargs or {}))
        if name == "_c10d_functional::reduce_scatter_tensor":
            self.received += {"gradient": args[0].nbytes - results.nbytes, "whole gradient": args[0].nbytes}
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and x.is_floating_point():
                self.note(name, x)
        return results

    def note(self, name: str, x: Tensor) -> None:
        storage = x.untyped_storage()
        self.shapes.add(tuple(x.shape))
        if storage._cdata not in self.others and storage._cdata not in self.alive:
            self.alive[storage._cdata] = name, storage.nbytes()
            weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        if self.now() > self.peak:
            self.peak, self.by_op = self.now(), Counter()
            for name, size in self.alive.values():
                self.by_op[name] += size

    def now(self) -> int:
        return sum(size for _, size in self.alive.values())


# Per pair of values, as counted in lfcc_kernels/ops/info_nce.py.
FLOPS = {"lfcc::info_nce": 2, "lfcc::info_nce_one_pass": 4, "lfcc::info_nce_grad": 4}


@contextlib.contextmanager
def gathers(alive: Alive) -> Iterator[None]:
    """Records the bytes that gathers receive inside `gather_rows`. Send buffers are not counted as live, because gloo's
    thread frees them at any time."""
    collectives = torch.ops._c10d_functional
    gather, exchange = collectives.all_gather_into_tensor, dist.all_gather

    def all_gather_into_tensor(rows: Tensor, *options: Any) -> Tensor:
        result = gather(rows, *options)
        what = "ids" if rows.dtype == torch.int64 else "rows"
        alive.received[what] += result.nbytes - rows.nbytes
        alive.message = max(alive.message, rows.nbytes)
        alive.alive.pop(rows.untyped_storage()._cdata, None)
        return result

    def all_gather(results: list[Tensor], mine: Tensor, **options: Any) -> None:
        exchange(results, mine, **options)
        alive.received["headers"] += sum(x.nbytes for x in results) - mine.nbytes

    with (
        mock.patch.object(collectives, "all_gather_into_tensor", all_gather_into_tensor),
        mock.patch.object(dist, "all_gather", all_gather),
    ):
        yield


# Directions, teacher dtypes with and without ids, and batches per update, on 1, 2 and 4 ranks.
CASES = [
    Run((8, 16), (64, 128), ROWS // steps, ranks, steps, direction=direction, teacher_bytes=size, ids=ids)
    for ranks, direction, (size, ids), steps in itertools.product(
        (1, 2, 4), DIRECTIONS, ((4, False), (2, True)), (1, 4)
    )
]


def features(run: Run, learn: bool) -> list[list[Tensor]]:
    """Maps of all stages, batch by batch."""
    channels = run.student_channels if learn else run.teacher_channels
    dtype = torch.bfloat16 if run.teacher_bytes == 2 and not learn else torch.float32
    maps = [[torch.randn(run.rows, c, 8, 8, dtype=dtype) for c in channels] for _ in range(run.accum_steps)]
    return [[x.requires_grad_(learn) for x in stages] for stages in maps]


def measure(run: Run, gather: str | dist.ProcessGroup) -> dict[str, Any]:
    """Memory, communication and FLOPs of one update on this rank."""
    students, teachers = features(run, True), features(run, False)
    lfcc = loss_of(run, gather)
    ids = [torch.arange(run.rows) for _ in teachers] if run.ids else None
    alive = Alive([*itertools.chain(*students, *teachers), *lfcc.parameters(), *(ids or ())])
    found: dict[str, Any] = {}

    def contrast(*rows: Any, **options: Any) -> Tensor:
        loss = lk.LFCCLoss.contrast(lfcc, *rows, **options)
        found.update(contrast=alive.peak, by_op=alive.by_op)
        alive.peak = 0
        return loss

    lfcc.contrast = contrast
    with lk.use_backend("cpu"), gathers(alive), alive:
        if run.accum_steps == 1:
            lfcc(students[0], teachers[0], ids and ids[0]).backward()
        else:
            with torch.no_grad():
                pyramids = [lfcc.student_pyramids(maps) for maps in students]
                teachers = [lfcc.teacher_pyramids(maps) for maps in teachers]
            cached = Distiller(nn.Identity(), None, lfcc).cache_gradients(pyramids, teachers, ids)
            found["cached"] = sum(x.nbytes for batch in cached for x in batch.pyramids)
    return found | {
        "received": alive.received,
        "message": alive.message,
        "backward": alive.peak,
        "flops": alive.flops,
        "dense": (run.local_batch, run.batch) in alive.shapes,
    }


def loss_of(run: Run, gather: str | dist.ProcessGroup) -> lk.LFCCLoss:
    channels = run.student_channels, run.teacher_channels
    return lk.LFCCLoss(*channels, scales=run.scales, direction=run.direction, gather=gather)


def ddp_traffic(run: Run) -> int:
    """Bytes of the gradients that DDP reduces."""
    sizes = []

    def note(group: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sizes.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    module = nn.parallel.DistributedDataParallel(loss_of(run, "none"))
    module.register_comm_hook(None, note)
    module(features(run, True)[0], features(run, False)[0]).backward()
    return sum(sizes)


def run_rank() -> dict[Any, Any]:
    groups = {1: "none", 2: dist.new_subgroups(2)[0], 4: "auto"}
    found: dict[Any, Any] = {run: measure(run, groups[run.ranks]) for run in CASES}
    return found | {"ddp": ddp_traffic(CASES[0])}


@pytest.fixture(scope="module", params=[pytest.param(4, marks=pytest.mark.slow, id="ranks")])
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The measurements of each of four ranks, alone, in pairs and together."""
    if "cpu" not in lk.available_backends():
        pytest.skip("the kernels are not compiled")
    return in_ranks(4, tmp_path_factory.mktemp("ranks"), run_rank)


@pytest.fixture(
    params=CASES, ids=lambda run: f"{run.ranks} ranks-{run.direction}-t{run.teacher_bytes}-K{run.accum_steps}"
)
def run(request: pytest.FixtureRequest) -> Run:
    return request.param


@pytest.fixture
def found(ranks: list[dict], run: Run) -> dict:
    """The measurements of a run, which are equal on all ranks."""
    first, *others = [rank[run] for rank in ranks]
    assert all(other == first for other in others)
    return first


def test_communication(run: Run, found: dict) -> None:
    received = found["received"]
    assert received["rows"] == run.rows_received
    assert received["ids"] == run.ids_received
    assert received["headers"] == run.headers_received
    assert received["gradient"] == run.gradient_received
    assert received["whole gradient"] == run.gathered_gradient
    assert received.total() - received["whole gradient"] == run.received
    assert found["message"] == run.message


def test_live_memory_by_op(run: Run, found: dict) -> None:
    made, own = found["by_op"], run.local_batch * run.width
    cells = run.student_cells if run.accum_steps == 1 else 0
    assert made["lfcc::lowpass"] == run.teacher_bytes * own + cells
    assert made["aten::mm"] == run.student_pyramids
    assert made["aten::_to_copy"] == run.teacher_pyramids - run.teacher_bytes * own + run.upcast_keys
    assert made["lfcc::gather_rows"] == run.gathered
    assert made["lfcc::info_nce_one_pass"] == pytest.approx(run.row_gradients, rel=0.01)  # and numbers of rows
    assert made["aten::cat"] == run.concatenated


def test_peak_memory_of_the_forward_pass(run: Run, found: dict) -> None:
    assert run.contrast <= found["contrast"] <= 1.01 * run.contrast
    assert not found["dense"]


def test_backward_pass_adds_at_most_two_gradients(run: Run, found: dict) -> None:
    more = max(2 * run.student_pyramids, run.gathered_gradient)
    assert found["backward"] <= 1.01 * (run.contrast + more)


def test_flops_are_those_of_the_ops(run: Run, found: dict) -> None:
    assert found["flops"] == run.flops


def test_gradients_are_cached_if_an_update_has_several_batches(run: Run, found: dict) -> None:
    assert found.get("cached", 0) == run.cached_gradients


def test_ddp_reduces_the_gradients_of_all_parameters(ranks: list[dict]) -> None:
    run = replace(CASES[0], ranks=4)
    for found in ranks:
        assert run.gradients_received(0) == 2 * 3 * found["ddp"] // 4


def test_eager_saves_the_logits() -> None:
    run, saved = Run((), (8,), rows=6, ranks=3), []
    pairs = [(torch.randn(run.local_batch, w, requires_grad=True), torch.randn(run.batch, w)) for w in run.widths]
    with lk.use_backend("eager"), FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            loss = info_nce_foreach(*zip(*pairs, strict=True)).mean()
        loss.backward()
    logits = {x.data_ptr(): x.nbytes for x in saved if x.shape == (run.local_batch, run.batch)}
    assert sum(logits.values()) >= run.logits
    assert counter.get_total_flops() == run.flops


def test_workspace_of_triton() -> None:
    pytest.importorskip("triton")
    from lfcc_kernels.backends.triton import info_nce_foreach as triton
    from lfcc_kernels.backends.triton.runtime import device_props
    from lfcc_kernels.backends.triton.tiles import table

    run = Run((), (64, 128), rows=32, ranks=16)
    rows = [[torch.randn(number, w) for w in run.widths] for number in (run.local_batch, run.batch)]
    chunk = table(device_props(rows[0][0].device).capability)["chunk_bytes"]
    temperature = torch.tensor(0.1)
    with Alive([*itertools.chain(*rows), temperature]) as alive:
        triton.info_nce_foreach(*rows, temperature, None, None, 0, True)
    assert 0.85 * run.workspace(chunk) <= alive.peak - run.row_gradients <= run.workspace(chunk)


@pytest.mark.parametrize(("student", "teacher", "_", "parameters"), cost_model.PAIRS)
def test_parameters_of_students(student: str, teacher: str, _: int, parameters: int) -> None:
    assert sum(p.numel() for p in timm.create_model(MODELS[student].timm).parameters()) == parameters


def test_page_has_the_tables_and_the_output_of_its_snippet(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text()
    tables = [cost_per_image(), cost_per_run(), cost_per_run((65536,), scales=(1, 2, 4, 7))]
    known = {line for table in tables for line in table.splitlines()}
    shown = [line for line in page.splitlines() if re.match(r"\| (student from teacher|\w+ from \w+) \|", line)]
    assert shown and set(shown) <= known
    assert all(table.splitlines()[0] in shown for table in tables)
    snippet, printed = re.search(r"```python\n(.*?)```\n+```\n(.*?)```", page, re.DOTALL).groups()
    exec(snippet, {})
    assert capsys.readouterr().out == printed
