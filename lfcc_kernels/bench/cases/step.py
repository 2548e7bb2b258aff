"""A whole step of training, as `lfcc distill` does it, with and without the loss: what share of a step the loss takes.

A step is: the frozen teacher's forward pass, the student's, cross-entropy + LFCC, backward, and AdamW over student,
projections and filters. The learning rate is 0, so that all candidates see one student for ever; AdamW does its work
all the same. The baseline leaves LFCC out and keeps both models' forward passes. Models are timm's with random weights,
drop nothing and have their batch normalisation in training mode. On a GPU products are taken in bfloat16 by autocast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lfcc_kernels.bench import machine, peers
from lfcc_kernels.bench.cases.base import SCALES, TEMPERATURE, Candidate, Case
from lfcc_kernels.bench.cases.ofa import MODELS

CLASSES = 1000
PAIRS = (("resnet18", "swin_t"), ("deit_t", "convnext_t"), ("resmlp_12", "vit_s"))


def cases(tiny: bool, dtype: torch.dtype | None) -> list[Case]:
    if machine.HERE.device.type == "cuda":
        batch, own = 128, dtype or torch.bfloat16
    else:
        batch, own = 8, dtype or torch.float32
    return [
        _step(*PAIRS[0], tiny, 4, 128, own, quick=True),
        *(_step(*pair, tiny, batch, 224, own) for pair in PAIRS),
    ]


class Learner(NamedTuple):
    """Student with loss and teacher, and the optimizer of the former."""

    distiller: torch.nn.Module  # a Distiller; `lfcc_kernels.distill` needs timm, and listing cases does not
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class TrainingStep(Case):
    """`run` goes on to the update. `learner` is that for images of a dtype: float64 models for the reference."""

    learner: Callable[[torch.dtype], Learner] = field(kw_only=True)

    def run(self, call: Candidate, inputs: Sequence[Tensor], upstream: Tensor | None) -> tuple[Tensor, ...]:
        """The loss, and the gradients of all weights that have more than one dimension.

        Those of a bias before a normalisation are zero but for rounding, which is no measure of a candidate.
        """
        distiller, optimizer = self.learner(inputs[0].dtype)
        loss = call(*inputs)
        loss.backward(upstream)
        optimizer.step()
        gradients = [p.grad for p in distiller.parameters() if p.dim() > 1 and p.grad is not None]
        optimizer.zero_grad()
        return loss.detach(), *gradients


def _step(
    student: str, teacher: str, tiny: bool, batch: int, side: int, dtype: torch.dtype, quick: bool = False
) -> Case:
    batch, side, scales = (2, 64, (1, 2)) if tiny else (batch, side, SCALES)
    device = machine.HERE.device

    @cache
    def learner(images: torch.dtype) -> Learner:
        from lfcc_kernels.distill import Distiller, build_lfcc, create_extractor
        from lfcc_kernels.distill.models import create_model

        torch.manual_seed(0)
        models = (
            create_model(MODELS[name].timm, image_size=side, num_classes=CLASSES).to(device)
            for name in (student, teacher)
        )
        extractors = [create_extractor(model, image_size=side) for model in models]
        lfcc = build_lfcc(*extractors, scales=scales, temperature=TEMPERATURE)
        of_images = torch.float64 if images == torch.float64 else torch.float32
        distiller = Distiller(extractors[0], extractors[1].to(of_images), lfcc, alpha=0).to(device, of_images)
        return Learner(distiller, torch.optim.AdamW(distiller.parameters(), lr=0.0))

    def mixed(images: Tensor) -> torch.autocast:
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and images.dtype != torch.float64)

    def ours(images: Tensor, labels: Tensor) -> Tensor:
        distiller, _ = learner(images.dtype)
        with mixed(images):
            return distiller(images, labels, distiller.teach(images))["loss"]

    def written(images: Tensor, labels: Tensor) -> Tensor:
        distiller, _ = learner(images.dtype)
        lfcc = distiller.lfcc
        with mixed(images):
            loss, student_maps, teacher_maps = _forward(distiller, images, labels)
            pyramids = zip(lfcc.student_filters, student_maps, strict=True)
            filters = [pyramid.bank(*student_map.shape[2:]) for pyramid, student_map in pyramids]
            weights = [projection.weight for projection in lfcc.student_projections]
            return loss + peers.lfcc_filter_each_scale(
                student_maps, teacher_maps, weights, filters, scales, TEMPERATURE
            )

    def without(images: Tensor, labels: Tensor) -> Tensor:
        with mixed(images):
            return _forward(learner(images.dtype).distiller, images, labels)[0]

    def inputs() -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 3, side, side, device=device), torch.randint(CLASSES, (batch,), device=device)

    exact = dtype == torch.float32 and device.type == "cpu"
    return TrainingStep(
        "step",
        f"{student}-from-{teacher}",
        (batch, 3, side, side),
        "fwd+bwd",
        inputs,
        {"ours": ours, "eager": written},
        dtype=dtype,
        learner=learner,
        quick=quick,
        heaps=False,
        baseline=without,
        # Rounded products switch ReLUs and maxima: 0.35 was seen in bfloat16, in a ResNet-18's convolutions.
        tolerance=None if exact else 0.5,
        close=learner.cache_clear,
    )


def _forward(distiller: torch.nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Cross-entropy, and the maps of student and teacher."""
    with torch.no_grad():
        _, teacher_maps = distiller.teacher(images)
    logits, student_maps = distiller.student(images)
    return torch.nn.functional.cross_entropy(logits.float(), labels), student_maps, teacher_maps
