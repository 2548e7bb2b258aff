"""The training loop: run folder, schedule, checkpoints, errors, precision and timing."""

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from toy_runs import SETTINGS, ToyBatches, make_distiller, no_evaluation, run

from lfcc_kernels.distill import Batch, Distiller, RunFolder, fit, load_checkpoint, metrics, read_csv
from lfcc_kernels.distill.loop import create_training_state
from lfcc_kernels.distill.metrics import PHASES, StepTimer
from lfcc_kernels.distill.update import update


def test_the_run_folder(tmp_path: Path) -> None:
    summary = run(tmp_path, ToyBatches())
    steps, epochs = read_csv(tmp_path / "steps.csv"), read_csv(tmp_path / "summary.csv")
    assert [row["step"] for row in steps] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert [row["step"] for row in epochs] == [4, 8, 12]
    assert epochs[-1] == summary == load_checkpoint(tmp_path / "checkpoints/last.pt")["progress"]["summary"]
    for row in steps + epochs:
        weighted = row["ce_weighted"] + row["kd_weighted"] + row["lfcc_weighted"]
        assert row["loss"] == pytest.approx(weighted, rel=1e-5)
        assert 0 < row["loss_share"] < 1 and 0 < row["data_share"] < 1 and row["images_per_second"] > 0
    assert epochs[0]["loss"] == pytest.approx((2 * steps[0]["loss"] + steps[1]["loss"] + steps[2]["loss"]) / 4)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.yaml", "versions.json", "steps.csv", "summary.csv", "events", "checkpoints"
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.pt", "best.pt"}
    assert list((tmp_path / "events").iterdir())


def test_the_log_has_weighted_terms(tmp_path: Path) -> None:
    settings = replace(SETTINGS, epochs=1, model_ema=False)
    fit(make_distiller(alpha=0.5, beta=0), ToyBatches(), no_evaluation, settings, RunFolder(tmp_path))
    (row,) = read_csv(tmp_path / "summary.csv")
    assert row["kd_weighted"] == pytest.approx(0.5 * row["kd"]) and "lfcc" not in row and "top1_ema" not in row
    assert row["loss"] == pytest.approx(row["ce"] + 0.5 * row["kd"], rel=1e-5)


def test_losses_decrease(tmp_path: Path) -> None:
    settings = replace(SETTINGS, epochs=8, lr=3e-3, log_interval=8)
    distiller = make_distiller(alpha=0.1, beta=0.1)
    fit(distiller, ToyBatches(batches=8), no_evaluation, settings, RunFolder(tmp_path))
    rows = read_csv(tmp_path / "summary.csv")
    assert rows[-1]["ce"] < 0.2 * rows[0]["ce"] and rows[-1]["lfcc"] < 0.9 * rows[0]["lfcc"]


def test_learning_rate_per_update(tmp_path: Path) -> None:
    run(tmp_path, ToyBatches(), log_interval=1, min_lr=1e-4)
    for row in read_csv(tmp_path / "steps.csv"):
        t = row["step"]
        warm_up, cosine = (1e-5 + (1e-3 - 1e-5) * t / 4, 1e-4 + (1e-3 - 1e-4) * (1 + math.cos(math.pi * t / 12)) / 2)
        assert row["lr"] == pytest.approx(warm_up if t < 4 else cosine if t < 12 else 1e-4)


def test_best_checkpoint_is_that_of_the_moving_average(tmp_path: Path) -> None:
    scores = iter([10.0, 50.0, 20.0, 70.0, 90.0, 60.0])  # student, average, student, ...
    settings, folder = replace(SETTINGS, checkpoint_interval=None), RunFolder(tmp_path)
    summary = fit(make_distiller(), ToyBatches(), lambda model: next(scores), settings, folder)
    assert load_checkpoint(folder.best)["progress"]["epoch"] == 2
    assert load_checkpoint(folder.last)["progress"]["epoch"] == 3
    assert (summary["top1"], summary["top1_ema"], summary["best_top1"]) == (90, 60, 70)


@pytest.mark.parametrize("scores", [(10, 30, 20), (30, 10, 20), (10, 20, 30), (30, 30, 30)])
def test_the_checkpoints_of_the_best_epochs_are_kept(tmp_path: Path, scores: tuple[int, ...]) -> None:
    settings, left = replace(SETTINGS, checkpoint_hist=2, model_ema=False), iter(scores)
    fit(make_distiller(), ToyBatches(), lambda model: float(next(left)), settings, RunFolder(tmp_path))
    best = sorted(enumerate(scores, start=1), key=lambda epoch: -epoch[1])[:2]  # of equals, the earlier one
    for name, (epoch, score) in zip(("best", "best-2"), best, strict=True):
        progress = load_checkpoint(tmp_path / f"checkpoints/{name}.pt")["progress"]
        assert (progress["epoch"], progress["summary"]["top1"]) == (epoch, score)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best.pt", "best-2.pt", "last.pt"}


def test_batches_that_do_not_fill_an_update_are_dropped(tmp_path: Path) -> None:
    summary = run(tmp_path, ToyBatches(batches=5), accum_steps=2)
    assert summary["step"] == 3 * 2
    assert [row["step"] for row in read_csv(tmp_path / "summary.csv")] == [2, 4, 6]


def test_moving_average(tmp_path: Path) -> None:
    run(tmp_path, ToyBatches(), model_ema_decay=0.5)
    checkpoint = load_checkpoint(tmp_path / "checkpoints/last.pt")
    first, last, average = (
        weights["head.weight"]
        for weights in (
            make_distiller().student.model.state_dict(),
            checkpoint["state_dict"],
            checkpoint["state_dict_ema"],
        )
    )
    assert 0 < (average - last).norm() < 0.5 * (first - last).norm()


def test_cached_teacher_outputs_need_no_teacher(tmp_path: Path) -> None:
    class Cached(ToyBatches):
        def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
            for images, labels, *_ in super().epoch(epoch, first):
                yield Batch(images, labels, teacher.teach(images))

    teacher = make_distiller()
    live = run(tmp_path / "live", ToyBatches())
    orphan = Distiller(make_distiller().student, None, make_distiller().lfcc)
    torch.manual_seed(0), make_distiller()
    cached = fit(orphan, Cached(), no_evaluation, SETTINGS, RunFolder(tmp_path / "cached"))
    assert cached["loss"] == live["loss"]


def test_a_loss_that_is_not_finite_raises_before_it_is_saved(tmp_path: Path) -> None:
    class Diverging(ToyBatches):
        def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
            for images, labels, *_ in super().epoch(epoch, first):
                yield Batch(images * (math.nan if epoch == 1 else 1), labels)

    with pytest.raises(FloatingPointError, match=r"the loss is nan at update 5; the last checkpoint is older"):
        run(tmp_path, Diverging(), log_interval=1)
    saved = load_checkpoint(tmp_path / "checkpoints/last.pt")
    assert saved["progress"]["step"] == 4
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


def test_a_folder_that_is_not_empty_raises(tmp_path: Path) -> None:
    (tmp_path / "summary.csv").write_text("precious")
    with pytest.raises(FileExistsError, match="is not empty: choose another --experiment"):
        run(tmp_path, ToyBatches())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_an_epoch_that_ends_early_raises(tmp_path: Path) -> None:
    class Short(ToyBatches):
        def __len__(self) -> int:
            return self.batches + 1

    with pytest.raises(RuntimeError, match=r"batches\.epoch ended after 4 of 5 updates"):
        run(tmp_path, Short())


def test_gradient_of_student_and_projections_is_clipped_together() -> None:
    settings = replace(SETTINGS, opt="sgd", lr=1.0, weight_decay=0, clip_grad=1e-3, sched="none", model_ema=False)
    distiller = make_distiller()
    state = create_training_state(distiller, 4, settings)
    before = [p.detach().clone() for p in distiller.parameters()]
    terms = update(state, [next(ToyBatches().epoch(0))], settings, StepTimer(torch.device("cpu")))
    steps = torch.stack([(p - b).norm() for p, b in zip(distiller.parameters(), before, strict=True)])
    assert terms["grad_norm"] > 0.1
    # The first step of timm's SGD with momentum and Nesterov is 1.9 times the gradient.
    assert steps.norm().item() == pytest.approx(1.9e-3, rel=1e-3)


def test_gradients_are_not_accumulated_over_updates() -> None:
    settings, batch = (replace(SETTINGS, lr=0, sched="none", model_ema=False), next(iter(ToyBatches().epoch(0))))
    state = create_training_state(make_distiller().eval(), 4, settings)
    norms = {update(state, [batch], settings, StepTimer(torch.device("cpu")))["grad_norm"].item() for _ in range(2)}
    assert len(norms) == 1


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_mixed_precision(tmp_path: Path, amp_dtype: str) -> None:
    assert SETTINGS.precision(torch.device("cpu")) == torch.float32
    assert SETTINGS.precision(torch.device("cuda")) == torch.bfloat16
    dtypes = set()
    distiller = make_distiller()
    distiller.student.model.blocks[0].mlp.fc1.register_forward_hook(
        lambda module, args, output: dtypes.add(output.dtype)
    )
    settings = replace(SETTINGS, epochs=1, amp=True, amp_dtype=amp_dtype)
    summary = fit(distiller, ToyBatches(), no_evaluation, settings, RunFolder(tmp_path))
    assert dtypes == {getattr(torch, amp_dtype)} and math.isfinite(summary["loss"])


def test_timer_separates_the_phases_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only slow parts advance."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, forward, backward):
            ctx.backward_seconds = backward
            clock.now += forward
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            clock.now += ctx.backward_seconds
            return grad, None, None

    class Slowed(torch.nn.Module):
        def __init__(self, module, forward, backward):
            super().__init__()
            self.module, self.seconds = module, (forward, backward)

        def forward(self, images):
            logits, features = self.module(images)
            return Slow.apply(logits, *self.seconds), features

    timer, distiller, batch = StepTimer(torch.device("cpu")), make_distiller(beta=0), next(ToyBatches().epoch(0))
    teacher = distiller.teach(batch.images)
    distiller.student, kl_div = Slowed(distiller.student, 0.05, 0.1), F.kl_div
    monkeypatch.setattr(F, "kl_div", lambda *args, **options: Slow.apply(kl_div(*args, **options), 0.15, 0.2))
    distiller.on_phase = timer.mark
    timer.restart()
    loss = distiller(batch.images, batch.labels, teacher)["loss"]
    timer.mark("loss")
    loss.backward()
    timer.mark("backward")
    seconds = dict.fromkeys(PHASES, 0.0) | {"student": 0.05, "loss": 0.35, "backward": 0.1}
    assert timer.read() == pytest.approx(seconds)


def test_an_incomplete_log_row_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "steps.csv").write_text("epoch,step,loss\n1,2,0.5\n1,4,0.25\n1,6,")
    assert [row["step"] for row in read_csv(tmp_path / "steps.csv")] == [2, 4]
    with RunFolder(tmp_path).log(2) as log:
        log.step({"epoch": 1, "step": 4, "loss": 0.125})
    assert list(csv.reader((tmp_path / "steps.csv").open())) == [
        ["epoch", "step", "loss"], ["1", "2", "0.5"], ["1", "4", "0.125"]
    ]  # fmt: skip
