"""The training loop: `fit` runs a `Distiller` over batches until the last epoch and keeps a run folder.

    summary = fit(distiller, batches, evaluate, settings, run)

- `distiller`: a `Distiller` on its device, student weights initialised, teacher loaded (or its outputs in the
  batches).
- `batches`: an object with `len(batches)`, the updates in an epoch, and `batches.epoch(epoch, first)`, an
  iterator over that epoch's `Batch`es from number `first` on, on the distiller's device. Its order must
  depend on the epoch alone; it may draw from the global generators while it iterates, but not while it skips
  to `first`. `Batch(images, labels, teacher)`: label -100 marks an unlabelled image; `teacher` is a
  `TeacherOutputs` from a cache, or None, and then `distiller.teach(images)` is called.
- `evaluate(model) -> float`: the top-1 accuracy in per cent of a classifier, called after every epoch with
  the bare student and, if there is one, its moving average.
- `settings`: a `FitSettings`. `run`: a `RunFolder`, for logs and checkpoints.
- `checkpoint`: what `load_checkpoint` returned, to go on from there. On the CPU that gives the same bits as a
  run that never stopped, also from the middle of an epoch.

It returns the last row of `summary.csv` as a dict: epoch, step, top1, top1_ema (with `model_ema`), best_top1
(of the averaged student if there is one), the epoch's mean of each term, lr, grad_norm, images_per_second,
data_share and loss_share (parts of the training time spent waiting for data, and in the loss), seconds
(training time so far, without evaluation).
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import TrainingState, save_checkpoint
from .distiller import Distiller, TeacherOutputs
from .metrics import StepTimer, Window, means
from .run_folder import RunFolder, RunLog

_SHOWN = ("epoch", "step", "top1", "top1_ema", "loss", "images_per_second", "data_share", "loss_share")


class Batch(NamedTuple):
    """images (B, 3, H, W), labels (B,) int64, -100 where there is none, the teacher's outputs if cached."""

    images: Tensor
    labels: Tensor
    teacher: TeacherOutputs | None = None


class Batches(Protocol):
    """A source of training batches; the rules are at the top of this file."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class FitSettings:
    """How to train. `amp` None means mixed precision on a GPU and float32 on a CPU."""

    epochs: int = 100
    opt: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    sched: str = "cosine"
    min_lr: float = 1e-6
    warmup_epochs: float = 5
    clip_grad: float | None = None
    amp: bool | None = None
    amp_dtype: str = "bfloat16"
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    log_interval: int = 50
    checkpoint_interval: int | None = None

    def precision(self, device: torch.device) -> torch.dtype:
        """The dtype of the matrix products and convolutions on `device`."""
        amp = device.type == "cuda" if self.amp is None else self.amp
        return getattr(torch, self.amp_dtype) if amp else torch.float32


def fit(
    distiller: Distiller,
    batches: Batches,
    evaluate: Callable[[nn.Module], float],
    settings: FitSettings,
    run: RunFolder,
    *,
    checkpoint: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Train `distiller`; the top of this file describes the arguments and the returned row.

    `config`, plain values, goes into the run folder and every checkpoint. Raises FileExistsError for a new
    run in a folder that is not empty, CheckpointError where `checkpoint` does not fit, FloatingPointError
    when the loss is no longer finite.
    """
    state = create_training_state(distiller, len(batches), settings)
    if checkpoint is None:
        run.require_empty()
    else:
        state.load_state_dict(checkpoint)
    progress = state.progress
    if progress.batch >= len(batches):
        raise ValueError(
            f"the checkpoint is {progress.batch} batches into an epoch that now has {len(batches)}: "
            "resume with the same data and batch size"
        )
    run.prepare(config or {})
    window = Window(next(distiller.parameters()).device)

    def save(path: Path) -> None:
        save_checkpoint(path, {**state.state_dict(), "config": dict(config or {})})

    with run.log(progress.step) as log, window.timer.watch(distiller.student):
        while progress.epoch < settings.epochs:
            distiller.train()
            window.timer.restart()
            for batch in _with_progress_bar(batches, state, settings):
                window.timer.lap("data")
                window.add(update(state, batch, settings, window.timer), len(batch.images))
                progress.batch += 1
                epoch_done = progress.batch == len(batches)
                checkpoint_due = bool(
                    settings.checkpoint_interval and progress.step % settings.checkpoint_interval == 0
                )
                if epoch_done or checkpoint_due or progress.step % settings.log_interval == 0:
                    _log_window(state, window, log)
                if checkpoint_due and not epoch_done:
                    save(run.last)
                window.timer.restart()
            if progress.batch != len(batches):
                raise RuntimeError(f"batches.epoch ended after {progress.batch} of {len(batches)} batches")
            if _finish_epoch(state, evaluate, log):
                save(run.best)
            save(run.last)
    return progress.summary


def create_training_state(distiller: Distiller, updates_per_epoch: int, settings: FitSettings) -> TrainingState:
    """Optimizer over student, projections and filters, schedule by update, loss scaler, moving average."""
    if updates_per_epoch < 1:
        raise ValueError("an epoch has no full batch: the training set is smaller than the batch size")
    device = next(distiller.parameters()).device
    optimizer = create_optimizer_v2(distiller, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=settings.sched,
        num_epochs=settings.epochs,
        min_lr=settings.min_lr,
        warmup_epochs=settings.warmup_epochs,
        warmup_lr=settings.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    ema = None
    if settings.model_ema:
        ema = ModelEmaV3(distiller.student.model, decay=settings.model_ema_decay, use_warmup=True)
    return TrainingState(
        distiller=distiller,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type, enabled=settings.precision(device) == torch.float16),
        ema=ema,
    )


def update(state: TrainingState, batch: Batch, settings: FitSettings, timer: StepTimer) -> dict[str, Tensor]:
    """One optimizer step. Returns the detached terms and the gradient norm before clipping, on the device."""
    distiller, device = state.distiller, batch.images.device
    precision = settings.precision(device)
    with nullcontext() if precision == torch.float32 else torch.autocast(device.type, dtype=precision):
        teacher = distiller.teach(batch.images) if batch.teacher is None else batch.teacher
        timer.lap("teacher")
        terms = distiller(batch.images, batch.labels, teacher)
    timer.lap("loss")
    state.scaler.scale(terms["loss"]).backward()
    timer.lap("backward")
    state.scaler.unscale_(state.optimizer)
    clip = math.inf if settings.clip_grad is None else settings.clip_grad
    grad_norm = nn.utils.clip_grad_norm_(distiller.parameters(), clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    state.progress.step += 1
    if state.scheduler is not None:
        state.scheduler.step_update(state.progress.step)
    if state.ema is not None:
        state.ema.update(distiller.student.model, step=state.progress.step)
    timer.lap("update")
    return {name: term.detach() for name, term in terms.items()} | {"grad_norm": grad_norm.detach()}


def _log_window(state: TrainingState, window: Window, log: RunLog) -> None:
    """Book the updates since the last call, and stop a run that has nothing more to gain."""
    progress, totals = state.progress, window.read()
    progress.add(totals)
    row = means(totals, state.distiller.weights)
    log.step({"epoch": progress.epoch + 1, "step": progress.step, "lr": state.lr, **row})
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(
            f"the loss is {row['loss']} at update {progress.step}; the last checkpoint is from before that: "
            "lower the learning rate, clip the gradient or warm up longer"
        )


def _finish_epoch(state: TrainingState, evaluate: Callable[[nn.Module], float], log: RunLog) -> bool:
    """Evaluate, log and step to the next epoch. Returns whether this was the best epoch so far."""
    progress = state.progress
    accuracy = {"top1": evaluate(state.distiller.student.model)}
    if state.ema is not None:
        accuracy["top1_ema"] = evaluate(state.ema.module)
    best = max(progress.best_top1, accuracy.get("top1_ema", accuracy["top1"]))
    improved = best > progress.best_top1
    progress.best_top1 = best
    progress.epoch += 1
    progress.summary = {
        "epoch": progress.epoch,
        "step": progress.step,
        **accuracy,
        "best_top1": best,
        "lr": state.lr,
        **means(progress.epoch_totals, state.distiller.weights),
        "seconds": progress.seconds,
    }
    progress.batch, progress.epoch_totals = 0, {}
    log.epoch(progress.summary)
    print(
        *(f"{name} {progress.summary[name]:.4g}" for name in _SHOWN if name in progress.summary),
        sep="  ",
        flush=True,
    )
    return improved


def _with_progress_bar(batches: Batches, state: TrainingState, settings: FitSettings) -> Iterable[Batch]:
    progress = state.progress
    return tqdm(
        batches.epoch(progress.epoch, progress.batch),
        desc=f"epoch {progress.epoch + 1}/{settings.epochs}",
        initial=progress.batch,
        total=len(batches),
        unit="step",
        leave=False,
        disable=not sys.stderr.isatty(),
    )
