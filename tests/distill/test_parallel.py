"""The training loop on several ranks with DDP and FSDP, against one process."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from gloo import in_ranks
from test_update import GRADIENTS, TIMER, assert_same, batch_of, distiller_of, gradients, split
from torch import Tensor, nn
from toy_runs import SETTINGS, Interrupted, InterruptedBatches, ToyBatches, make_distiller, no_evaluation

from lfcc_kernels.distill import Batch, CheckpointError, RunFolder, fit, load_checkpoint, read_csv
from lfcc_kernels.distill.distributed import _blocks, parallelize
from lfcc_kernels.distill.loop import create_training_state
from lfcc_kernels.distill.update import update

RANKS = 2
DIRECTIONS = ["student_to_teacher", "teacher_to_student", "symmetric"]
WAYS = {
    "DDP": {},
    "DDP, 2 batches": {"accum_steps": 2},
    "FSDP": {"fsdp": True},
    "FSDP, 2 batches": {"fsdp": True, "accum_steps": 2},
    "DDP, compiled": {"torchcompile": True},
    "FSDP, compiled": {"fsdp": True, "torchcompile": True},
}
# The ranks have different numbers of labels.
WHOLE = batch_of(size=8, labelled=5, ids=True)


class ShareOf:
    """This rank's share of another source of batches."""

    def __init__(self, batches: ToyBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, first: int = 0):
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for batch in self.batches.epoch(epoch, first):
            yield Batch(batch.images.chunk(size)[rank], batch.labels.chunk(size)[rank])


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients_in(way: str, direction: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms of this rank, and gradients of one update."""
    settings = replace(GRADIENTS, **WAYS[way])
    distiller = distiller_of("test_vit", direction)
    before = {name: p.detach().clone() for name, p in distiller.named_parameters()}
    if settings.torchcompile:
        compile_with_little_work(distiller)
    state = create_training_state(distiller, 4, settings)
    mine = split(split(WHOLE, RANKS)[dist.get_rank()], settings.accum_steps)
    terms = update(state, mine, settings, TIMER)
    return terms, {name: before[name] - full(p.detach()) for name, p in distiller.named_parameters()}


def compile_with_little_work(distiller: nn.Module) -> None:
    """Use a backend that only traces, without code generation."""
    torch.compiler.reset()
    for module in (distiller, *_blocks(distiller.student.model)):
        module.compile = (lambda compile: lambda: compile(backend="aot_eager"))(module.compile)


def messages_of_an_update(accum_steps: int) -> int:
    """The number of gradient all-reduces in an update of several batches."""
    settings, buckets = replace(GRADIENTS, accum_steps=accum_steps), []
    state = create_training_state(distiller_of("test_vit"), 4, settings)

    def count(_, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buckets.append(bucket.index())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

    state.module.register_comm_hook(None, count)
    update(state, split(split(WHOLE, RANKS)[dist.get_rank()], accum_steps), settings, TIMER)
    return len(buckets)


def runs(folder: Path, **settings) -> dict:
    """A run, and the same run interrupted in the middle of an epoch and resumed."""
    options = replace(SETTINGS, **settings)

    def run(name: str, batches, checkpoint: dict | None = None) -> dict:
        distiller = make_distiller()
        torch.manual_seed(dist.get_rank())  # different dropout on each rank
        return fit(distiller, batches, no_evaluation, options, RunFolder(folder / name), checkpoint=checkpoint)

    summary = run("straight", ShareOf(ToyBatches()))
    stop = {1: 10, 2: 7}[options.accum_steps]  # batches; the last checkpoint is in the middle of an epoch
    with suppress(Interrupted):
        run("broken", InterruptedBatches(ShareOf(ToyBatches()), stop))
    dist.barrier()
    torch.manual_seed(99)
    run("broken", ShareOf(ToyBatches()), load_checkpoint(folder / "broken/checkpoints/last.pt"))
    return summary


def of_a_rank(folder: Path) -> dict:
    results = {
        (way, direction): gradients_in(way, direction)
        for way in WAYS
        for direction in (DIRECTIONS if way.startswith("DDP") and "compiled" not in way else DIRECTIONS[:1])
    }
    results["messages"] = [messages_of_an_update(steps) for steps in (1, 2, 4)]
    for name, settings in (("DDP", {}), ("FSDP", {"fsdp": True}), ("DDP, 2 batches", {"accum_steps": 2})):
        results[name, "run"] = runs(folder / name, **settings)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module", params=[pytest.param(RANKS, marks=pytest.mark.slow, id="ranks")])
def ranks(folder: Path) -> list[dict]:
    """The results of each rank."""
    return in_ranks(RANKS, folder, of_a_rank, folder)


@pytest.mark.parametrize(
    ("way", "direction"),
    [(way, d) for way in WAYS for d in DIRECTIONS if d == DIRECTIONS[0] or way in ("DDP", "DDP, 2 batches")],
)
def test_gradients_equal_one_process(ranks: list[dict], way: str, direction: str) -> None:
    terms, expected = gradients(distiller_of("test_vit", direction), [WHOLE])
    for rank in ranks:
        assert_same(rank[way, direction][1], expected)
    names = terms.keys() - {"grad_norm"}
    mean = {name: torch.stack([rank[way, direction][0][name] for rank in ranks]).mean() for name in names}
    assert_same(mean, {name: terms[name] for name in names})
    for rank in ranks:
        torch.testing.assert_close(rank[way, direction][0]["grad_norm"], terms["grad_norm"], rtol=1e-4, atol=0)


def test_gradients_are_reduced_once_per_update(ranks: list[dict]) -> None:
    for rank in ranks:
        once, of_two, of_four = rank["messages"]
        assert once == of_two == of_four > 0


@pytest.mark.parametrize("way", ["DDP", "FSDP", "DDP, 2 batches"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(ranks: list[dict], folder: Path, way: str) -> None:
    straight, resumed = (
        load_checkpoint(folder / way / name / "checkpoints/last.pt") for name in ("straight", "broken")
    )
    for part in ("state_dict", "state_dict_ema", "loss"):
        for name, value in straight[part].items():
            assert torch.equal(value, resumed[part][name]), name
    assert len(straight["rng"]) == RANKS
    for one, other in zip(straight["rng"], resumed["rng"], strict=True):
        assert torch.equal(one["torch"], other["torch"])
    assert not torch.equal(straight["rng"][0]["torch"], straight["rng"][1]["torch"])
    losses = [
        [(row["step"], row["loss"]) for row in read_csv(folder / way / name / "steps.csv")]
        for name in ("straight", "broken")
    ]
    assert losses[0] == losses[1]


def test_checkpoint_of_a_sharded_run_has_the_form_of_any_run(ranks: list[dict], folder: Path) -> None:
    sharded, plain = (load_checkpoint(folder / way / "straight/checkpoints/last.pt") for way in ("FSDP", "DDP"))
    model = timm.create_model("test_vit", num_classes=3, img_size=32, patch_size=8, proj_drop_rate=0.1)
    model.load_state_dict(sharded["state_dict"])
    for part in ("state_dict", "state_dict_ema", "loss"):
        assert {n: v.shape for n, v in sharded[part].items()} == {n: v.shape for n, v in plain[part].items()}
    # The same dropout; only rounding differs.
    assert_same(sharded["state_dict"], plain["state_dict"], rtol=2e-2)


def test_the_log_averages_over_ranks(ranks: list[dict], folder: Path) -> None:
    assert ranks[0]["DDP", "run"] == ranks[1]["DDP", "run"]
    (row, *_) = read_csv(folder / "DDP/straight/steps.csv")
    shares = {name: row[name] for name in row if name.endswith("_share")}
    assert shares.keys() == {"data_share", "teacher_share", "loss_share", "gather_share"}
    assert all(0 < share < 1 for share in shares.values())


def test_resuming_with_another_number_of_processes_raises(ranks: list[dict], folder: Path) -> None:
    state = create_training_state(make_distiller(), 4, SETTINGS)
    with pytest.raises(CheckpointError, match="is from 2 processes but this run has 1"):
        state.load_state_dict(load_checkpoint(folder / "DDP/straight/checkpoints/last.pt"))


def test_fsdp_in_one_process_raises() -> None:
    with pytest.raises(ValueError, match="--fsdp needs several processes to shard over, but there is one"):
        parallelize(nn.Linear(1, 1), nn.Linear(1, 1), None, shard=True, compiled=False)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("test_vit", "blocks"), ("test_resnet", "layer1 layer2 layer3 layer4"), ("test_convnext", "stages")],
)
def test_blocks_are_the_sequential_modules_of_a_model(name: str, blocks: str) -> None:
    model = timm.create_model(name)
    expected = [child for block in blocks.split() for child in model.get_submodule(block)]
    assert [id(block) for block in _blocks(model) if block in expected] == [id(block) for block in expected]
    numel = sum(p.numel() for block in _blocks(model) for p in block.parameters())
    assert numel > 0.5 * sum(p.numel() for p in model.parameters())
