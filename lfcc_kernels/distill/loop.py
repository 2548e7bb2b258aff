"""The training loop: `fit` runs a `Distiller` over batches until the last epoch and keeps a run folder.

    summary = fit(distiller, batches, evaluate, settings, run)

- `distiller`: a `Distiller` on its device, student weights initialised, teacher loaded (or its outputs in the
  batches).
- `batches`: an object with `len(batches)`, the batches of an epoch, and `batches.epoch(epoch, first)`, an
  iterator over that epoch's `Batch`es from number `first` on, on the distiller's device. Its order must
  depend on the epoch alone; it may draw from the global generators while it iterates, but not while it skips
  to `first`. `Batch(images, labels, teacher, ids)`: label -100 marks an unlabelled image; `teacher` is a
  `TeacherOutputs` from a cache, or None, and then `distiller.teach(images)` is called. Every rank has its own
  batches, as many and as large as the others.
- `evaluate(model) -> float`: the top-1 accuracy in per cent of a classifier, called after every epoch with
  the student and, if there is one, its moving average; on every rank, with the same result.
- `settings`: a `FitSettings`. `run`: a `RunFolder`, for logs and checkpoints.
- `checkpoint`: what `load_checkpoint` returned, to go on from there. On the CPU that gives the same bits as a
  run that never stopped, also from the middle of an epoch.

Where a process group is initialised, each rank calls `fit`. After SIGTERM it ends the update, saves and raises
`Terminated`.

It returns the last row of `summary.csv` as a dict: epoch, step, top1, top1_ema (with `model_ema`), best_top1
(of the averaged student if there is one), the epoch's mean of each term, lr, grad_norm, images_per_second of
all ranks, data_share, teacher_share, loss_share and gather_share (parts of the training time: waiting for
data, in the teacher, in the loss, waiting for other ranks' rows), seconds (training time so far, without
evaluation).
"""

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from .batches import Batch, Batches
from .checkpoint import TrainingState, save_checkpoint
from .distiller import Classifier, Distiller
from .metrics import Window, means
from .parallel import parallelize, share_buffers
from .ranks import any_rank, barrier, is_main
from .run_folder import RunFolder, RunLog
from .settings import FitSettings
from .update import update

_SHOWN = (
    "epoch", "step", "top1", "top1_ema", "loss", "images_per_second",
    "data_share", "teacher_share", "loss_share", "gather_share",
)  # fmt: skip


class Terminated(SystemExit):
    """The run was told to end, and saved. Its exit code is 143, that of a process which SIGTERM ended."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(143)
        if is_main():
            print(f"terminated after update {step}, saved in {checkpoint}: go on with --resume", file=sys.stderr)


@contextmanager
def terminations() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM only sets what the yielded function returns. Signals reach the main thread alone."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


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
    state = create_training_state(distiller, len(batches) // settings.accum_steps, settings)
    if checkpoint is None:
        run.require_empty()
        barrier()  # before one rank fills it
    else:
        state.load_state_dict(checkpoint)
    progress, updates = state.progress, len(batches) // settings.accum_steps
    if progress.updates >= updates:
        raise ValueError(
            f"the checkpoint is {progress.updates} updates into an epoch that now has {updates}: "
            "resume with the same data and batch size"
        )
    run.prepare(config or {})
    window = Window(next(distiller.parameters()).device)

    def save(path: Path) -> None:
        checkpoint = {**state.state_dict(), "config": dict(config or {})}
        if is_main():
            save_checkpoint(path, checkpoint)

    distiller.clock = window.timer.lap
    with run.log(progress.step) as log, terminations() as terminated:
        while progress.epoch < settings.epochs:
            distiller.train()
            window.timer.restart()
            for group in _with_progress_bar(batches, state, settings):
                window.timer.lap("data")
                window.add(update(state, group, settings, window.timer), sum(len(batch.images) for batch in group))
                progress.updates += 1
                epoch_done = progress.updates == updates
                stop = any_rank(terminated())
                checkpoint_due = stop or bool(
                    settings.checkpoint_interval and progress.step % settings.checkpoint_interval == 0
                )
                if epoch_done or checkpoint_due or progress.step % settings.log_interval == 0:
                    _log_window(state, window, log)
                if checkpoint_due and not epoch_done:
                    save(run.last)
                    if stop:
                        raise Terminated(progress.step, run.last)
                window.timer.restart()
            if progress.updates != updates:
                raise RuntimeError(f"batches.epoch ended after {progress.updates} of {updates} updates")
            place = _finish_epoch(state, evaluate, settings, log)
            if place <= settings.checkpoint_hist:
                if is_main():
                    run.make_place(place, settings.checkpoint_hist)
                save(run.place(place))
            save(run.last)
            if any_rank(terminated()):
                raise Terminated(progress.step, run.last)
    return progress.summary


def create_training_state(distiller: Distiller, updates_per_epoch: int, settings: FitSettings) -> TrainingState:
    """Optimizer over student, projections and filters, schedule by update, loss scaler, moving average.

    Parallelizes the distiller where there are several ranks.
    """
    if updates_per_epoch < 1:
        raise ValueError("an epoch has no full batch: the training set is smaller than the batch size")
    device = next(distiller.parameters()).device
    if settings.channels_last:
        distiller.to(memory_format=torch.channels_last)
        if distiller.teacher is not None:
            distiller.teacher.to(memory_format=torch.channels_last)
    ema = None
    if settings.model_ema:
        ema = ModelEmaV3(distiller.student.model, decay=settings.model_ema_decay, use_warmup=True)
    average = None if ema is None else ema.module
    module = parallelize(distiller, average, shard=settings.fsdp, compiled=settings.torchcompile)
    optimizer = create_optimizer_v2(
        distiller,
        opt=settings.opt,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=settings.sched,
        num_epochs=settings.epochs,
        min_lr=settings.min_lr,
        decay_epochs=settings.decay_epochs,
        decay_rate=settings.decay_rate,
        warmup_epochs=settings.warmup_epochs,
        warmup_lr=settings.lr / 100 if settings.warmup_lr is None else settings.warmup_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return TrainingState(
        distiller=distiller,
        module=module,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type, enabled=settings.precision(device) == torch.float16),
        ema=ema,
    )


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


def _finish_epoch(
    state: TrainingState, evaluate: Callable[[nn.Module], float], settings: FitSettings, log: RunLog
) -> int:
    """Evaluate, log and step to the next epoch. Returns its place among the epochs, 1 for the best so far."""
    progress = state.progress
    share_buffers(state.distiller)
    accuracy = {"top1": evaluate(Classifier(state.distiller))}
    if state.ema is not None:
        share_buffers(state.ema.module)
        accuracy["top1_ema"] = evaluate(state.ema.module)
    score = accuracy.get("top1_ema", accuracy["top1"])
    place = 1 + sum(better >= score for better in progress.best)
    progress.best = sorted([*progress.best, score], reverse=True)[: settings.checkpoint_hist]
    progress.epoch += 1
    progress.summary = {
        "epoch": progress.epoch,
        "step": progress.step,
        **accuracy,
        "best_top1": progress.best[0],
        "lr": state.lr,
        **means(progress.epoch_totals, state.distiller.weights),
        "seconds": progress.seconds,
    }
    progress.updates, progress.epoch_totals = 0, {}
    log.epoch(progress.summary)
    if is_main():
        shown = (f"{name} {progress.summary[name]:.4g}" for name in _SHOWN if name in progress.summary)
        print(*shown, sep="  ", flush=True)
    return place


def _with_progress_bar(batches: Batches, state: TrainingState, settings: FitSettings) -> Iterable[tuple[Batch, ...]]:
    """The batches of each update that is left of the epoch."""
    progress, size = state.progress, settings.accum_steps
    source = iter(batches.epoch(progress.epoch, progress.updates * size))
    return tqdm(
        zip(*[source] * size, strict=False),
        desc=f"epoch {progress.epoch + 1}/{settings.epochs}",
        initial=progress.updates,
        total=len(batches) // size,
        unit="step",
        leave=False,
        disable=not (is_main() and sys.stderr.isatty()),
    )
