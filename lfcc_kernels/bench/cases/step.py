"""Suite `step`: a whole training step of `lfcc distill` with and without the loss, for the loss's share of a step.

A step is the teacher's and the student's forward pass, cross-entropy + LFCC, backward, and AdamW over student,
projections and filters. The learning rate is 0, so all candidates see the same student, and AdamW still does its work.
The baseline omits LFCC and runs both forward passes. Models are timm's with random weights, without dropout, and with
batch normalisation in training mode. On a GPU autocast computes products in bfloat16.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lfcc_kernels.bench.cases.base import SCALES, TEMPERATURE, Candidate, Case
from lfcc_kernels.bench.machine import Machine
from lfcc_kernels.bench.ofa import MODELS
from lfcc_kernels.bench.peers import whole_loss

if TYPE_CHECKING:  # listing cases must not import it, because it needs timm
    from lfcc_kernels.distill import Distiller

CLASSES = 1000
PAIRS = (("resnet18", "swin_t"), ("deit_t", "convnext_t"), ("resmlp_12", "vit_s"))


def cases(machine: Machine, dtype: torch.dtype | None) -> list[Case]:
    batch, own = (128, dtype or torch.bfloat16) if machine.gpu else (8, dtype or torch.float32)
    return [
        _step(machine, *PAIRS[0], 4, 128, own, quick=True),
        *(_step(machine, *pair, batch, 224, own) for pair in PAIRS),
    ]


class Learner(NamedTuple):
    """Student, teacher and loss in one module, and the optimizer of its trainable parameters."""

    distiller: "Distiller"
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class TrainingStep(Case):
    """A case whose `run` includes the update. `learner` takes the dtype of the images: float64 for the reference."""

    learner: Callable[[torch.dtype], Learner] = field(kw_only=True)

    def run(self, call: Candidate, inputs: Sequence[Tensor], upstream: Tensor | None) -> tuple[Tensor, ...]:
        """The loss and the gradients of all weights with more than one dimension.

        The gradient of a bias before a normalisation is only rounding error and says nothing about a candidate.
        """
        distiller, optimizer = self.learner(inputs[0].dtype)
        loss = call(*inputs)
        loss.backward(upstream)
        optimizer.step()
        gradients = [p.grad for p in distiller.parameters() if p.dim() > 1 and p.grad is not None]
        optimizer.zero_grad()
        return loss.detach(), *gradients


def _step(
    machine: Machine, student: str, teacher: str, batch: int, side: int, dtype: torch.dtype, quick: bool = False
) -> Case:
    batch, side, scales = (2, 64, (1, 2)) if machine.tiny else (batch, side, SCALES)
    device = machine.device

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
        loss = build_lfcc(*extractors, scales=scales, temperature=TEMPERATURE)
        model_dtype = torch.float64 if images == torch.float64 else torch.float32
        distiller = Distiller(extractors[0], extractors[1].to(model_dtype), loss, alpha=0).to(device, model_dtype)
        return Learner(distiller, torch.optim.AdamW(distiller.parameters(), lr=0.0))

    def autocast(images: Tensor) -> torch.autocast:
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and images.dtype != torch.float64)

    def lfcc(images: Tensor, labels: Tensor) -> Tensor:
        distiller, _ = learner(images.dtype)
        with autocast(images):
            return distiller(images, labels, distiller.teach(images))["loss"]

    def eager(images: Tensor, labels: Tensor) -> Tensor:
        distiller, _ = learner(images.dtype)
        module = distiller.lfcc
        with autocast(images):
            loss, student_maps, teacher_maps = _forward(distiller, images, labels)
            pyramids = zip(module.student_filters, student_maps, strict=True)
            filters = [pyramid.bank(*student_map.shape[2:]) for pyramid, student_map in pyramids]
            weights = list(module.student_projections.parameters())
            return loss + whole_loss.filter_each_scale(
                student_maps, teacher_maps, weights, filters, scales, TEMPERATURE
            )

    def without(images: Tensor, labels: Tensor) -> Tensor:
        with autocast(images):
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
        {"lfcc": lfcc, "eager": eager},
        dtype=dtype,
        learner=learner,
        quick=quick,
        heaps=False,
        baseline=without,
        # Rounding flips ReLUs and maxima: bfloat16 deviated by up to 0.35 in the convolutions of a ResNet-18.
        tolerance=None if exact else 0.5,
        close=learner.cache_clear,
    )


def _forward(distiller: "Distiller", images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Cross-entropy, and the feature maps of student and teacher."""
    with torch.no_grad():
        _, teacher_maps = distiller.teacher(images)
    logits, student_maps = distiller.student(images)
    return torch.nn.functional.cross_entropy(logits.float(), labels), student_maps, teacher_maps
