"""`Distiller`: student and losses in one module, which trains through `forward` only; the frozen teacher is outside.

loss = CE + alpha * T^2 * KL(teacher || student at temperature T) + beta * LFCC

CE is the cross-entropy with the labels, KL follows Hinton et al. (arXiv 1503.02531), LFCC follows arXiv 2405.18524.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

from lfcc_kernels import LFCCLoss
from lfcc_kernels.distributed import GatheredKeys

from .distributed import is_distributed, world_size
from .features import FeatureExtractor, Tap


class TeacherOutputs(NamedTuple):
    """The teacher's logits (B, classes) and one pooled pyramid (B, cells, C_t) per stage.

    None if the term that reads it has weight 0. Small enough to cache for every image of a data set.
    """

    logits: Tensor | None
    pyramids: list[Tensor] | None


class StudentOutputs(NamedTuple):
    """The student's logits (B, classes) and pooled, projected pyramids (B, cells, C_t), None without LFCC."""

    logits: Tensor
    pyramids: list[Tensor] | None


class CachedGradients(NamedTuple):
    """GradCache: the LFCC loss of an update of several batches, and its gradients for one of them.

    `loss` is the loss of all batches together. `pyramids` are its gradients times the number of batches, so that the
    mean over batches has the whole loss and its whole gradient, as the other terms do.
    """

    loss: Tensor
    pyramids: list[Tensor]
    temperature: Tensor | None


class Distiller(nn.Module):
    """The module to wrap in DDP, compile and save: student, projections and filters, but not the teacher.

    All parameters are used inside `forward`, the only method that DDP and FSDP synchronise.

    Args:
        student: the model to train.
        teacher: frozen and set to evaluation mode. It is not a submodule: `parameters`, `state_dict`, `to` and DDP do
            not include it. None if its outputs come from a teacher cache.
        lfcc: required if `beta` > 0; see `build_lfcc`.
        alpha, beta: weights of logit KD and of LFCC. A term of weight 0 is not computed.
        kd_temperature: temperature of both logits in logit KD.
        label_smoothing: smoothing of class labels in the cross-entropy; does not apply to probabilities.
    """

    def __init__(
        self,
        student: FeatureExtractor,
        teacher: FeatureExtractor | None = None,
        lfcc: LFCCLoss | None = None,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        kd_temperature: float = 4.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}, expected a finite number >= 0")
        if not (math.isfinite(kd_temperature) and kd_temperature > 0):
            raise ValueError(f"kd_temperature is {kd_temperature}, expected a finite positive number")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}, expected a number >= 0 and < 1")
        if beta > 0 and lfcc is None:
            raise ValueError(f"beta is {beta} but lfcc is None: pass lfcc=build_lfcc(student, teacher), or beta=0")
        self.student = student
        self.lfcc = lfcc if beta > 0 else None
        self.weights = {"ce": 1.0} | {name: w for name, w in (("kd", alpha), ("lfcc", beta)) if w > 0}
        self.kd_temperature = kd_temperature
        self.label_smoothing = label_smoothing
        self.on_phase: Callable[[str], None] | None = None  # called at the end of a phase with its name
        # Avoids nn.Module.__setattr__, which would register the teacher as a submodule.
        object.__setattr__(self, "teacher", teacher and teacher.eval().requires_grad_(False))

    def compile(self, **options: Any) -> None:
        """Compile student, pooling and losses in place, each without graph breaks; `options` as `torch.compile`.

        Call it before DDP wraps the module. The gather over ranks is not compiled, so that it can be timed.
        """
        self.student.compile(fullgraph=True, **options)
        for name in ("_pool", "_terms"):
            setattr(self, name, torch.compile(getattr(self, name), fullgraph=True, **options))

    @torch.no_grad()
    def teach(self, images: Tensor) -> TeacherOutputs:
        """Teacher outputs for `images` (B, 3, H, W): one forward pass, features pooled into pyramids."""
        if self.weights.keys() == {"ce"}:
            return TeacherOutputs(None, None)
        if self.teacher is None:
            raise RuntimeError("this Distiller has no teacher: pass teacher=, or give fit batches with teacher outputs")
        logits, features = self.teacher(images)
        return TeacherOutputs(
            logits if "kd" in self.weights else None,
            self.lfcc.teacher_pyramids(features) if "lfcc" in self.weights else None,
        )

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        teacher_outputs: TeacherOutputs | None = None,
        ids: Tensor | None = None,
        *,
        labelled: Tensor | None = None,
        cached: CachedGradients | None = None,
    ) -> dict[str, Tensor] | StudentOutputs:
        """Compute the losses or, if `labels` is None, the student's outputs.

        Args:
            images: (B, 3, H, W).
            labels: (B,) int64 with -100 for unlabelled images, which the mean of the cross-entropy excludes; or
                probabilities (B, classes), e.g. of mixup.
            teacher_outputs: result of `teach` for the same images.
            ids: (B,) integers; images with equal ids are not negatives of each other.
            labelled: 0-d divisor of the cross-entropy; by default `labelled_images(labels)`.
            cached: result of `cache_gradients`, replaces the LFCC loss in an update of several batches.

        Returns:
            The 0-d tensors "loss", the weighted sum, and "ce", "kd", "lfcc", the unweighted terms whose weight is not
            0; and "logits" (B, classes).
        """
        contrasts = labels is not None and "lfcc" in self.weights and cached is None
        pending = self.lfcc.gather_async(teacher_outputs.pyramids, ids) if contrasts else None
        logits, features = self.student(images)
        self._end_phase("student")
        if logits.requires_grad and self.on_phase is not None:
            logits.register_hook(lambda grad: self._end_phase("loss"))  # after the backward pass of the losses
        pyramids = self._pool(features)
        if labels is None:
            return StudentOutputs(logits, pyramids)
        if labelled is None and not labels.is_floating_point():
            labelled = labelled_images(labels)
        self._end_phase("loss")
        keys = None if pending is None else pending.wait()
        self._end_phase("gather")
        return self._terms(logits, pyramids, labels, teacher_outputs, ids, keys, labelled, cached)

    def cache_gradients(
        self, pyramids: Sequence[list[Tensor]], teachers: Sequence[list[Tensor]], ids: Sequence[Tensor] | None
    ) -> list[CachedGradients]:
        """GradCache (Gao et al., arXiv 2101.06983): the LFCC loss of several batches as one, and its gradients.

        `pyramids` and `teachers` are the pyramids of each batch, computed without gradients. The result, one item per
        batch, is the argument `cached` of the second forward pass of that batch.
        """
        batches, sizes = len(pyramids), [len(batch[0]) for batch in pyramids]
        students = [torch.cat(stage).detach().requires_grad_() for stage in zip(*pyramids, strict=True)]
        temperature, learned = self.lfcc.info_nce.temperature, []
        if isinstance(temperature, Tensor):
            learned = [temperature.detach().requires_grad_()]
        loss = self.lfcc.contrast(
            students,
            [torch.cat(stage) for stage in zip(*teachers, strict=True)],
            None if ids is None else torch.cat(list(ids)),
            temperature=learned[0] if learned else None,
        )
        gradients = torch.autograd.grad(cast(Tensor, loss), students + learned)
        per_batch = [(batches * gradient).split(sizes) for gradient in gradients[: len(students)]]
        of_temperature = gradients[-1] if learned else None
        return [CachedGradients(loss.detach(), list(stages), of_temperature) for stages in zip(*per_batch, strict=True)]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the student excludes from weight decay, for timm's optimizer factory."""
        names: set[str] = getattr(self.student.model, "no_weight_decay", set)()
        return {f"student.model.{name}" for name in names}

    def _end_phase(self, name: str) -> None:
        if self.on_phase is not None:
            self.on_phase(name)

    def _pool(self, features: list[Tensor]) -> list[Tensor] | None:
        return None if self.lfcc is None else self.lfcc.student_pyramids(features)

    def _terms(
        self,
        logits: Tensor,
        pyramids: list[Tensor] | None,
        labels: Tensor,
        teacher: TeacherOutputs,
        ids: Tensor | None,
        keys: GatheredKeys | None,
        labelled: Tensor | None,
        cached: CachedGradients | None,
    ) -> dict[str, Tensor]:
        with torch.autocast(logits.device.type, enabled=False):
            terms = {"ce": _cross_entropy(logits.float(), labels, labelled, self.label_smoothing)}
            if "kd" in self.weights:
                terms["kd"] = _logit_kd(logits.float(), teacher.logits.float(), self.kd_temperature)
            if "lfcc" in self.weights and cached is None:
                terms["lfcc"] = cast(Tensor, self.lfcc.contrast(pyramids, teacher.pyramids, ids, keys=keys))
            elif "lfcc" in self.weights:
                terms["lfcc"] = _with_gradients(cached, pyramids, self.lfcc.info_nce.temperature)
        loss = cast(Tensor, sum(self.weights[name] * term for name, term in terms.items()))
        return {"loss": loss, **terms, "logits": logits}


class Classifier(nn.Module):
    """The student of a distiller as a classifier, images (B, 3, H, W) -> logits (B, classes); also if sharded."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, images: Tensor) -> Tensor:
        return self.distiller(images).logits


class HasTaps(Protocol):
    """An extractor or a teacher cache."""

    @property
    def taps(self) -> tuple[Tap, ...]: ...

    @property
    def channels(self) -> list[int]: ...


def build_lfcc(student: HasTaps, teacher: HasTaps, **options) -> LFCCLoss:
    """`LFCCLoss(**options)` between the taps of two models, paired in order.

    Raises ValueError if the numbers of taps differ or a feature map is smaller than a scale.
    """
    if len(student.taps) != len(teacher.taps):
        raise ValueError(
            f"the student has {len(student.taps)} taps but the teacher has {len(teacher.taps)}: set equally many "
            "--student-taps and --teacher-taps"
        )
    lfcc = LFCCLoss(student.channels, teacher.channels, **options)
    largest = max(options.get("scales", (1, 2, 4)))
    for side, extractor in (("student", student), ("teacher", teacher)):
        for tap in extractor.taps:
            if min(tap.grid) < largest:
                raise ValueError(
                    f"{side} tap {tap.name} has a grid of {tap.grid[0]} x {tap.grid[1]}, smaller than scale {largest}: "
                    f"use larger images, smaller --lfcc-scales or other --{side}-taps"
                )
    return lfcc


def labelled_images(labels: Tensor) -> Tensor:
    """The number of `labels` (B,) that are not -100, averaged over ranks, 0-d float32.

    With this divisor, the cross-entropy averaged over ranks is the mean over all labelled images, however they are
    distributed over the ranks.
    """
    count = (labels != -100).sum().float()
    if not is_distributed():
        return count
    return collectives.all_reduce(count, "sum", dist.group.WORLD) / world_size()


def _cross_entropy(logits: Tensor, labels: Tensor, labelled: Tensor | None, smoothing: float) -> Tensor:
    """With class labels, the sum over labelled images divided by `labelled`; with probabilities, the mean."""
    if labels.is_floating_point():
        return F.cross_entropy(logits, labels)
    total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    return total / labelled.clamp(min=1e-6)  # 0 if no image has a label


def _with_gradients(cached: CachedGradients, pyramids: list[Tensor], temperature: float | Tensor) -> Tensor:
    """The cached loss with its cached gradients."""
    inner = sum((pyramid * gradient).sum() for pyramid, gradient in zip(pyramids, cached.pyramids, strict=True))
    if cached.temperature is not None:
        inner = inner + temperature * cached.temperature
    return cached.loss + (inner - inner.detach())


def _logit_kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature^2 * KL(teacher || student), mean over the batch."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits are {tuple(student.shape)} but teacher logits are {tuple(teacher.shape)}: both need the "
            "same classes"
        )
    student, teacher = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
