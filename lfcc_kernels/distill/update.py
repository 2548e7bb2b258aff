"""One update of the student: a batch, or several that are contrasted as one big batch."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from .batches import Batch
from .checkpoint import TrainingState
from .distiller import CachedGradients, Distiller, TeacherOutputs, labelled_images
from .metrics import StepTimer
from .parallel import no_sync
from .settings import FitSettings


def update(
    state: TrainingState, batches: Sequence[Batch], settings: FitSettings, timer: StepTimer
) -> dict[str, Tensor]:
    """One optimizer step on one or more batches. Returns the detached terms, their means over the batches, and the
    gradient norm before clipping, on the device.

    Several batches are contrasted as one (`Distiller.cache_gradients`), which takes a second forward pass of the
    student. It is exact for a model whose output for an image does not depend on the other images: BatchNorm's
    statistics stay those of each batch, and are counted once.
    """
    distiller, device = state.distiller, batches[0].images.device
    if settings.channels_last:
        batches = [batch._replace(images=batch.images.to(memory_format=torch.channels_last)) for batch in batches]
    with settings.autocast(device):
        teachers = [distiller.teach(batch.images) if batch.teacher is None else batch.teacher for batch in batches]
    timer.lap("teacher")
    generators, cached = [nullcontext() for _ in batches], [None for _ in batches]
    if len(batches) > 1 and "lfcc" in distiller.weights:
        generators, cached = _first_pass(distiller, batches, teachers, settings)
        timer.lap("loss")
    labelled = None
    if not batches[0].labels.is_floating_point():
        labelled = labelled_images(torch.cat([batch.labels for batch in batches])) / len(batches)
    results = []
    passes = zip(batches, teachers, generators, cached, strict=True)
    for number, (batch, teacher, generator, cache) in enumerate(passes, start=1):
        with no_sync(state.module) if number < len(batches) else nullcontext():
            with generator, settings.autocast(device):
                terms = state.module(batch.images, batch.labels, teacher, batch.ids, labelled=labelled, cached=cache)
            timer.lap("loss")
            state.scaler.scale(terms["loss"] / len(batches)).backward()
            timer.lap("backward")
        results.append(terms)
    grad_norm = _step(state, settings)
    timer.lap("update")
    names = ("loss", *distiller.weights)
    return {name: torch.stack([terms[name].detach() for terms in results]).mean() for name in names} | {
        "grad_norm": grad_norm
    }


def _first_pass(
    distiller: Distiller, batches: Sequence[Batch], teachers: Sequence[TeacherOutputs], settings: FitSettings
) -> tuple[list[AbstractContextManager], list[CachedGradients]]:
    """The LFCC loss of all batches as one, and for each a context that draws again what its first pass drew."""
    device, generators, pyramids = batches[0].images.device, [], []
    with torch.no_grad(), _uncounted(distiller.student):
        for batch in batches:
            generators.append(_same_draws(device))
            with settings.autocast(device):
                pyramids.append(distiller(batch.images).pyramids)
    ids = None if batches[0].ids is None else [batch.ids for batch in batches]
    return generators, distiller.cache_gradients(pyramids, [teacher.pyramids for teacher in teachers], ids)


def _step(state: TrainingState, settings: FitSettings) -> Tensor:
    """Clip, step optimizer, schedule and average; the gradient norm before clipping."""
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


def _same_draws(device: torch.device) -> AbstractContextManager:
    """A context, entered later, in which torch draws what it draws from now on."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]

    @contextmanager
    def draws() -> Iterator[None]:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        yield

    return draws()


@contextmanager
def _uncounted(model: nn.Module) -> Iterator[None]:
    """Leave the running statistics of BatchNorm as they are; it normalises by those of the batch all the same."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
