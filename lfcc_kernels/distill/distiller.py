"""Student and LFCC loss in one module whose `forward` is the only door, with the frozen teacher beside it.

loss = CE + alpha * T^2 * KL(teacher || student at temperature T) + beta * LFCC

CE: cross-entropy with the labels; KL as in Hinton et al. (arXiv 1503.02531); LFCC as in arXiv 2405.18524.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfcc_kernels import LFCCLoss

from .features import FeatureExtractor


class TeacherOutputs(NamedTuple):
    """What the losses need of the teacher: logits (B, classes), and a pooled pyramid (B, cells, C_t) for each
    stage.

    None where the term that reads it has weight 0. Small enough to be kept for every image of a data set.
    """

    logits: Tensor | None
    pyramids: list[Tensor] | None


class Distiller(nn.Module):
    """`alpha` weighs the logit term, `beta` the LFCC term; a term of weight 0 is not computed.

    `lfcc` is needed where `beta` > 0; `build_lfcc` makes one that fits two extractors. `teacher` is frozen
    and put in evaluation mode. It is not a submodule: neither `parameters`, `state_dict` nor `to` reach it.
    It may be None where its outputs come from a cache.
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
    ) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number that is not negative, got {value}")
        if not (math.isfinite(kd_temperature) and kd_temperature > 0):
            raise ValueError(f"kd_temperature must be a finite positive number, got {kd_temperature}")
        if beta > 0 and lfcc is None:
            raise ValueError("beta > 0 needs the LFCC loss: pass lfcc=build_lfcc(student, teacher), or beta=0")
        self.student = student
        self.lfcc = lfcc if beta > 0 else None
        self.weights = {"ce": 1.0} | {name: w for name, w in (("kd", alpha), ("lfcc", beta)) if w > 0}
        self.kd_temperature = kd_temperature
        # Past nn.Module's own assignment, which would register it.
        object.__setattr__(self, "teacher", teacher and teacher.eval().requires_grad_(False))

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

    def forward(self, images: Tensor, labels: Tensor, teacher_outputs: TeacherOutputs) -> dict[str, Tensor]:
        """0-d tensors: "loss", the weighted sum, and the raw terms "ce", "kd", "lfcc" that have a weight.

        labels (B,) int64; -100 marks an unlabelled image, which cross-entropy leaves out of its mean.
        """
        logits, features = self.student(images)
        with torch.autocast(images.device.type, enabled=False):
            terms = {"ce": _cross_entropy(logits.float(), labels)}
            if "kd" in self.weights:
                terms["kd"] = _logit_kd(logits.float(), teacher_outputs.logits.float(), self.kd_temperature)
        if "lfcc" in self.weights:
            pyramids = self.lfcc.student_pyramids(features)
            terms["lfcc"] = self.lfcc.contrast(pyramids, teacher_outputs.pyramids)
        return {"loss": sum(self.weights[name] * term for name, term in terms.items()), **terms}

    def no_weight_decay(self) -> set[str]:
        """Names that the student's authors keep out of weight decay, for timm's optimizer factory."""
        names = getattr(self.student.model, "no_weight_decay", set)()
        return {f"student.model.{name}" for name in names}


def build_lfcc(student: FeatureExtractor, teacher: FeatureExtractor, **options) -> LFCCLoss:
    """`LFCCLoss(**options)` between the taps of two extractors, the first with the first and so on.

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


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled images, 0 if there is none."""
    labelled = (labels != -100).sum()
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / labelled.clamp(min=1)


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
