"""Student and LFCC loss in one module whose `forward` is the only door, with the frozen teacher beside it.

loss = CE + alpha * T^2 * KL(teacher || student at temperature T) + beta * LFCC

CE: cross-entropy with the labels; KL as in Hinton et al. (arXiv 1503.02531); LFCC as in arXiv 2405.18524.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

from lfcc_kernels import LFCCLoss

from .features import FeatureExtractor, Tap
from .ranks import joined_others, world_size


class TeacherOutputs(NamedTuple):
    """What the losses need of the teacher: logits (B, classes), and a pooled pyramid (B, cells, C_t) for each
    stage.

    None where the term that reads it has weight 0. Small enough to be kept for every image of a data set.
    """

    logits: Tensor | None
    pyramids: list[Tensor] | None


class StudentOutputs(NamedTuple):
    """logits (B, classes), and low-passed and projected features (B, cells, C_t) for each stage, None without LFCC."""

    logits: Tensor
    pyramids: list[Tensor] | None


class CachedGradients(NamedTuple):
    """The LFCC loss of an update that runs in several batches, and its gradients for one of them.

    `loss` is that of all batches together, `pyramids` its gradients times their number. A mean over the batches then
    has the whole loss and its whole gradient, as those of the other terms.
    """

    loss: Tensor
    pyramids: list[Tensor]
    temperature: Tensor | None


class Distiller(nn.Module):
    """The one module to wrap in DDP, compile and save: student, projections and filters, but not the teacher.

    `alpha` weighs the logit term, `beta` the LFCC term; a term of weight 0 is not computed. `lfcc` is needed where
    `beta` > 0; `build_lfcc` makes one that fits two extractors. `teacher` is frozen and put in evaluation mode. It is
    not a submodule: neither `parameters`, `state_dict`, `to` nor DDP reach it. It may be None where its outputs come
    from a cache. `label_smoothing` is of the cross-entropy with labels that are no probabilities.

    Everything that trains runs inside `forward`, since DDP and FSDP follow no other call.
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
                raise ValueError(f"{name} must be a finite number that is not negative, got {value}")
        if not (math.isfinite(kd_temperature) and kd_temperature > 0):
            raise ValueError(f"kd_temperature must be a finite positive number, got {kd_temperature}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be from 0 to below 1, got {label_smoothing}")
        if beta > 0 and lfcc is None:
            raise ValueError("beta > 0 needs the LFCC loss: pass lfcc=build_lfcc(student, teacher), or beta=0")
        self.student = student
        self.lfcc = lfcc if beta > 0 else None
        self.weights = {"ce": 1.0} | {name: w for name, w in (("kd", alpha), ("lfcc", beta)) if w > 0}
        self.kd_temperature = kd_temperature
        self.label_smoothing = label_smoothing
        self.clock: Callable[[str], None] | None = None  # called with the name of the part that has just ended
        # Past nn.Module's own assignment, which would register it.
        object.__setattr__(self, "teacher", teacher and teacher.eval().requires_grad_(False))

    def compile(self, **options: Any) -> None:
        """Compile student, pooling and losses in place, each without a graph break; `options` as `torch.compile`.

        To be called before DDP wraps the module. The gather of the ranks stays outside, where it is timed.
        """
        self.student.compile(fullgraph=True, **options)
        self._pool = torch.compile(self._pool, fullgraph=True, **options)
        self._terms = torch.compile(self._terms, fullgraph=True, **options)

    @torch.no_grad()
    def teach(self, images: Tensor) -> TeacherOutputs:
        """The teacher's view of `images` (B, 3, H, W): one forward pass, its pyramids pooled once."""
        if self.weights.keys() == {"ce"}:
            return TeacherOutputs(None, None)
        if self.teacher is None:
            raise RuntimeError("this Distiller has no teacher: pass one, or give fit batches with teacher outputs")
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
        """What the student makes of `images` (B, 3, H, W) or, where there are labels, the losses.

        Args:
            labels: (B,) int64, -100 marks an unlabelled image, which cross-entropy leaves out of its mean; or
                probabilities (B, classes), as mixup makes them.
            teacher_outputs: what `teach` returned for the same images.
            ids: (B,) integers: images with equal ids are no negatives of each other.
            labelled: 0-d, what cross-entropy is divided by; `labelled_images(labels)` by default.
            cached: takes the place of the LFCC loss in an update of several batches.

        Returns:
            0-d tensors: "loss", the weighted sum, and the raw terms "ce", "kd", "lfcc" that have a weight; and
            "logits" (B, classes).
        """
        travelling = None
        if labels is not None and "lfcc" in self.weights and cached is None:
            travelling = self.lfcc.gather_async(teacher_outputs.pyramids, ids)
        logits, features = self.student(images)
        self._end_of_part("student")
        if logits.requires_grad and self.clock is not None:
            # Autograd runs later nodes first: here the losses are behind it, and the student is still ahead.
            logits.register_hook(lambda grad: self._end_of_part("loss"))
        pyramids = self._pool(features)
        if labels is None:
            return StudentOutputs(logits, pyramids)
        if labelled is None and not labels.is_floating_point():
            labelled = labelled_images(labels)
        self._end_of_part("loss")
        keys = travelling and travelling.wait()
        self._end_of_part("gather")
        return self._terms(logits, pyramids, labels, teacher_outputs, ids, keys, labelled, cached)

    def cache_gradients(
        self, pyramids: Sequence[list[Tensor]], teachers: Sequence[list[Tensor]], ids: Sequence[Tensor] | None
    ) -> list[CachedGradients]:
        """The LFCC loss of several batches as one, from the pyramids that `forward` made of each without a gradient.

        Gradient caching (GradCache, Gao et al., arXiv 2101.06983) of the compact vectors: the loss is computed once,
        and the second forward pass of each batch takes its gradients from here. Returns those, batch by batch.
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
        gradients = torch.autograd.grad(loss, students + learned)
        of_batches = [(batches * gradient).split(sizes) for gradient in gradients[: len(students)]]
        of_temperature = gradients[-1] if learned else None
        return [
            CachedGradients(loss.detach(), list(stages), of_temperature) for stages in zip(*of_batches, strict=True)
        ]

    def no_weight_decay(self) -> set[str]:
        """Names that the student's authors keep out of weight decay, for timm's optimizer factory."""
        names = getattr(self.student.model, "no_weight_decay", set)()
        return {f"student.model.{name}" for name in names}

    def _end_of_part(self, name: str) -> None:
        if self.clock is not None:
            self.clock(name)

    def _pool(self, features: list[Tensor]) -> list[Tensor] | None:
        return None if self.lfcc is None else self.lfcc.student_pyramids(features)

    def _terms(
        self,
        logits: Tensor,
        pyramids: list[Tensor] | None,
        labels: Tensor,
        teacher: TeacherOutputs,
        ids: Tensor | None,
        keys: tuple[list[Tensor], Tensor | None] | None,
        labelled: Tensor | None,
        cached: CachedGradients | None,
    ) -> dict[str, Tensor]:
        with torch.autocast(logits.device.type, enabled=False):
            terms = {"ce": _cross_entropy(logits.float(), labels, labelled, self.label_smoothing)}
            if "kd" in self.weights:
                terms["kd"] = _logit_kd(logits.float(), teacher.logits.float(), self.kd_temperature)
            if "lfcc" in self.weights and cached is None:
                terms["lfcc"] = self.lfcc.contrast(pyramids, teacher.pyramids, ids, keys=keys)
            elif "lfcc" in self.weights:
                terms["lfcc"] = _with_gradients(cached, pyramids, self.lfcc.info_nce.temperature)
        loss = sum(self.weights[name] * term for name, term in terms.items())
        return {"loss": loss, **terms, "logits": logits}


class Classifier(nn.Module):
    """The student of a distiller as a classifier, images (B, 3, H, W) -> logits (B, classes), sharded or not."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, images: Tensor) -> Tensor:
        return self.distiller(images).logits


class Tapped(Protocol):
    """What has taps: an extractor, or a cache of what one gave."""

    taps: tuple[Tap, ...]
    channels: list[int]


def build_lfcc(student: Tapped, teacher: Tapped, **options) -> LFCCLoss:
    """`LFCCLoss(**options)` between the taps of two sides, the first with the first and so on.

    Raises ValueError where the taps differ in number or a map is smaller than a scale.
    """
    if len(student.taps) != len(teacher.taps):
        raise ValueError(
            f"the student has {len(student.taps)} taps and the teacher {len(teacher.taps)}: "
            "name as many --student-taps as --teacher-taps"
        )
    lfcc = LFCCLoss(student.channels, teacher.channels, **options)
    largest = max(options.get("scales", (1, 2, 4)))
    for side, extractor in (("student", student), ("teacher", teacher)):
        for tap in extractor.taps:
            if min(tap.grid) < largest:
                raise ValueError(
                    f"the {side}'s tap {tap.name} is {tap.grid[0]} x {tap.grid[1]}, smaller than scale "
                    f"{largest}: choose larger images, smaller --lfcc-scales or other --{side}-taps"
                )
    return lfcc


def labelled_images(labels: Tensor) -> Tensor:
    """0-d float32: how many of `labels` (B,) are not -100, on average over the ranks.

    Cross-entropy over this number has, averaged over ranks, the mean over all labelled images of the batch, however
    they fell to the ranks.
    """
    count = (labels != -100).sum().float()
    if not joined_others():
        return count
    return collectives.all_reduce(count, "sum", dist.group.WORLD) / world_size()


def _cross_entropy(logits: Tensor, labels: Tensor, labelled: Tensor | None, smoothing: float) -> Tensor:
    """With class numbers, the sum over the labelled images by `labelled`; with probabilities, the mean."""
    if labels.is_floating_point():
        return F.cross_entropy(logits, labels)
    total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    return total / labelled.clamp(min=1e-6)  # 0 where no image has a label


def _with_gradients(cached: CachedGradients, pyramids: list[Tensor], temperature: float | Tensor) -> Tensor:
    """The cached loss, with the cached gradients."""
    inner = sum((pyramid * gradient).sum() for pyramid, gradient in zip(pyramids, cached.pyramids, strict=True))
    if cached.temperature is not None:
        inner = inner + temperature * cached.temperature
    return cached.loss + (inner - inner.detach())


def _logit_kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature^2 * KL(teacher || student), mean over the batch."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} must be of one "
            "shape: both need the same classes"
        )
    student, teacher = (
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
    )
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
