"""The training loop: `fit` trains a `Distiller` on batches until the last epoch, and writes a run folder."""

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

from .checkpoint import TrainingState, save_checkpoint
from .config import FitSettings
from .data.loader import Batch, Batches
from .distiller import Classifier, Distiller
from .distributed import all_reduce_any, barrier, broadcast_buffers, is_main, parallelize
from .metrics import MetricAccumulator, means
from .run_folder import RunFolder, RunLog
from .update import update

_SHOWN = (
    "epoch", "step", "top1", "top1_ema", "loss", "images_per_second",
    "data_share", "teacher_share", "loss_share", "gather_share",
)  # fmt: skip


class Terminated(SystemExit):
    """The run received SIGTERM and saved a checkpoint. The exit code is 143, as for a process that SIGTERM ended."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(143)
        if is_main():
            print(f"terminated after update {step}, saved {checkpoint}: continue with --resume", file=sys.stderr)


@contextmanager
def terminations() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGTERM was received, which has no other effect inside the context."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield received.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received.is_set
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
    """Train `distiller` and return the last row of `summary.csv`.

    With an initialised process group, every rank calls `fit`. After SIGTERM it finishes the update, saves a checkpoint
    and raises `Terminated`.

    Args:
        distiller: on its device, with initialised student weights, and a teacher unless the batches have its outputs.
        batches: source of training batches, see `Batches`.
        evaluate: returns the top-1 accuracy in per cent of a classifier. It is called on every rank after every epoch,
            for the student and for its moving average if there is one, and must return the same value on all ranks.
        settings: how to train.
        run: folder for logs and checkpoints.
        checkpoint: result of `load_checkpoint` to resume from, also from the middle of an epoch. On the CPU the
            resumed run equals an uninterrupted one bit for bit.
        config: plain values to store in the run folder and in every checkpoint.

    Returns:
        epoch, step, top1, top1_ema (with `model_ema`), best_top1 (of the moving average if there is one), the mean of
        each term over the epoch, lr, grad_norm, images_per_second (of all ranks), data_share, teacher_share, loss_share
        and gather_share (fractions of the training time: waiting for data, teacher, loss, waiting for rows of other
        ranks), seconds (training time so far, without evaluation).

    Raises:
        FileExistsError: a new run would use a folder that is not empty.
        CheckpointError: `checkpoint` does not match the run.
        FloatingPointError: the loss is not finite.
    """
    state = create_training_state(distiller, len(batches) // settings.accum_steps, settings)
    if checkpoint is None:
        run.require_empty()
        barrier()  # no rank may write into the folder before all have checked it
    else:
        state.load_state_dict(checkpoint)
    progress, updates = state.progress, len(batches) // settings.accum_steps
    if progress.updates >= updates:
        raise ValueError(
            f"the checkpoint is at update {progress.updates} of an epoch but this run has {updates} updates per epoch: "
            "resume with the same data and batch size"
        )
    run.prepare(config or {})
    metrics = MetricAccumulator(next(distiller.parameters()).device)

    def save(path: Path) -> None:
        checkpoint = {**state.state_dict(), "config": dict(config or {})}
        if is_main():
            save_checkpoint(path, checkpoint)

    distiller.on_phase = metrics.timer.mark
    with run.log(progress.step) as log, terminations() as terminated:
        while progress.epoch < settings.epochs:
            distiller.train()
            metrics.timer.restart()
            for group in _with_progress_bar(batches, state, settings):
                metrics.timer.mark("data")
                metrics.add(update(state, group, settings, metrics.timer), sum(len(batch.images) for batch in group))
                progress.updates += 1
                epoch_done = progress.updates == updates
                stop = all_reduce_any(terminated())
                checkpoint_due = stop or bool(
                    settings.checkpoint_interval and progress.step % settings.checkpoint_interval == 0
                )
                if epoch_done or checkpoint_due or progress.step % settings.log_interval == 0:
                    _log_updates(state, metrics, log)
                if checkpoint_due and not epoch_done:
                    save(run.last)
                    if stop:
                        raise Terminated(progress.step, run.last)
                metrics.timer.restart()
            if progress.updates != updates:
                raise RuntimeError(
                    f"batches.epoch ended after {progress.updates} of {updates} updates, expected len(batches) batches"
                )
            place = _finish_epoch(state, evaluate, settings, log)
            if place <= settings.checkpoint_hist:
                if is_main():
                    run.rotate_best(place, settings.checkpoint_hist)
                save(run.best_path(place))
            save(run.last)
            if all_reduce_any(terminated()):
                raise Terminated(progress.step, run.last)
    return progress.summary


def create_training_state(distiller: Distiller, updates_per_epoch: int, settings: FitSettings) -> TrainingState:
    """Optimizer of student, projections and filters, scheduler by update, loss scaler and moving average.

    Wraps or shards the distiller if there are several ranks.
    """
    if updates_per_epoch < 1:
        raise ValueError(
            "the training set is smaller than one update (batch size x --accum-steps x processes): lower --batch-size "
            "or --accum-steps"
        )
    device = next(distiller.parameters()).device
    if settings.channels_last:
        distiller.to(memory_format=torch.channels_last)
        if distiller.teacher is not None:
            distiller.teacher.to(memory_format=torch.channels_last)
    ema = None
    if settings.model_ema:
        ema = ModelEmaV3(distiller.student.model, decay=settings.model_ema_decay, use_warmup=True)
    average = None if ema is None else ema.module
    module = parallelize(
        distiller, distiller.student.model, average, shard=settings.fsdp, compiled=settings.torchcompile
    )
    optimizer = create_optimizer_v2(
        distiller, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.momentum
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


def _log_updates(state: TrainingState, metrics: MetricAccumulator, log: RunLog) -> None:
    """Log the updates since the last call. Raises FloatingPointError if their loss is not finite."""
    progress, totals = state.progress, metrics.read()
    progress.add(totals)
    row = means(totals, state.distiller.weights)
    log.step({"epoch": progress.epoch + 1, "step": progress.step, "lr": state.lr, **row})
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(
            f"the loss is {row['loss']} at update {progress.step}; the last checkpoint is older: lower --lr, set "
            "--clip-grad, or increase --warmup-epochs"
        )


def _finish_epoch(
    state: TrainingState, evaluate: Callable[[nn.Module], float], settings: FitSettings, log: RunLog
) -> int:
    """Evaluate and log the epoch. Returns its rank among all epochs so far, 1 for the most accurate."""
    progress = state.progress
    broadcast_buffers(state.distiller)
    accuracy = {"top1": evaluate(Classifier(state.distiller))}
    if state.ema is not None:
        broadcast_buffers(state.ema.module)
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
    """The batches of each remaining update of the epoch."""
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
