"""One optimizer step on one batch, or on several batches that are contrasted as one (GradCache); used by `fit`."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from .checkpoint import TrainingState
from .config import FitSettings
from .data.loader import Batch
from .distiller import CachedGradients, Distiller, TeacherOutputs, labelled_images
from .distributed import no_sync
from .metrics import StepTimer


def update(
    state: TrainingState, batches: Sequence[Batch], settings: FitSettings, timer: StepTimer
) -> dict[str, Tensor]:
    """One optimizer step. Returns the terms, averaged over the batches, and the gradient norm before clipping.

    Several batches are contrasted as one (`Distiller.cache_gradients`), which needs a second forward pass of the
    student. This is exact if the output for an image does not depend on the other images of the batch. BatchNorm uses
    the statistics of each batch, and updates its running statistics once per batch. The results are 0-d tensors on the
    device, without gradients.
    """
    distiller, device = state.distiller, batches[0].images.device
    if settings.channels_last:
        batches = [batch._replace(images=batch.images.to(memory_format=torch.channels_last)) for batch in batches]
    with settings.autocast(device):
        teachers = [distiller.teach(batch.images) if batch.teacher is None else batch.teacher for batch in batches]
    timer.mark("teacher")
    rngs: list[AbstractContextManager] = [nullcontext() for _ in batches]
    cached: list[CachedGradients | None] = [None for _ in batches]
    if len(batches) > 1 and "lfcc" in distiller.weights:
        rngs, cached = _first_pass(distiller, batches, teachers, settings)
        timer.mark("loss")
    labelled = None
    if not batches[0].labels.is_floating_point():
        labelled = labelled_images(torch.cat([batch.labels for batch in batches])) / len(batches)
    results = []
    passes = zip(batches, teachers, rngs, cached, strict=True)
    for number, (batch, teacher, rng, gradients) in enumerate(passes, start=1):
        with no_sync(state.module) if number < len(batches) else nullcontext():
            with rng, settings.autocast(device):
                terms = state.module(
                    batch.images, batch.labels, teacher, batch.ids, labelled=labelled, cached=gradients
                )
            timer.mark("loss")
            state.scaler.scale(terms["loss"] / len(batches)).backward()
            timer.mark("backward")
        results.append(terms)
    grad_norm = _step(state, settings)
    timer.mark("update")
    names = ("loss", *distiller.weights)
    return {name: torch.stack([terms[name].detach() for terms in results]).mean() for name in names} | {
        "grad_norm": grad_norm
    }


def _first_pass(
    distiller: Distiller, batches: Sequence[Batch], teachers: Sequence[TeacherOutputs], settings: FitSettings
) -> tuple[list[AbstractContextManager], list[CachedGradients]]:
    """GradCache of all batches as one, and for each batch a context that replays the RNG of its first pass."""
    device, rngs, pyramids = batches[0].images.device, [], []
    with torch.no_grad(), _frozen_bn_stats(distiller.student):
        for batch in batches:
            rngs.append(_replay_rng(device))
            with settings.autocast(device):
                pyramids.append(distiller(batch.images).pyramids)
    ids = None if batches[0].ids is None else [batch.ids for batch in batches]
    return rngs, distiller.cache_gradients(pyramids, [teacher.pyramids for teacher in teachers], ids)


def _step(state: TrainingState, settings: FitSettings) -> Tensor:
    """Clip gradients, then step optimizer, scheduler and moving average. Returns the gradient norm before clipping."""
    distiller, progress = state.distiller, state.progress
    state.scaler.unscale_(state.optimizer)
    clip = math.inf if settings.clip_grad is None else settings.clip_grad
    grad_norm = nn.utils.clip_grad_norm_(distiller.parameters(), clip).detach()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    progress.step += 1
    if state.scheduler is not None:
        state.scheduler.step_update(progress.step)
    if state.ema is not None:
        state.ema.update(distiller.student.model, step=progress.step)
    return grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm


def _replay_rng(device: torch.device) -> AbstractContextManager:
    """Context manager that replays the RNG state captured now."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]

    @contextmanager
    def replay() -> Iterator[None]:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        yield

    return replay()


@contextmanager
def _frozen_bn_stats(model: nn.Module) -> Iterator[None]:
    """Do not update BatchNorm's running statistics; it still normalises by the statistics of the batch."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
