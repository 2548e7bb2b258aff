"""LFCC as a training task for timm's `train.py`; docs/timm.md shows the lines to change."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
import torch
from timm.data import resolve_data_config
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .data.loader import mirror_ids
from .distiller import Distiller, TeacherOutputs, build_lfcc
from .distributed import rank
from .features import create_extractor
from .models import TeacherInput, create_model

try:
    from timm.task import TrainingTask
except ImportError:
    TrainingTask = None
if not hasattr(TrainingTask, "get_checkpoint_state"):
    raise ImportError(
        f"timm {timm.__version__} is installed but LFCCTask needs the training tasks of timm 1.0.27 or newer: "
        "pip install -U timm"
    )

_logger = logging.getLogger(__name__)


class LFCCTask(TrainingTask):
    """Cross-entropy + alpha * logit KD + beta * LFCC, computed by a `Distiller` with student and projections.

    Optimizer, EMA, gradient clipping and DDP use the whole distiller. Evaluation and checkpoints use the bare student,
    so the keys are those of `timm.create_model`; the projections are in the checkpoint's `task_state`. The teacher is
    frozen, stays in evaluation mode and gets images in its own normalization.

    Args:
        student_model: a timm model, on its device.
        teacher_model: a model, or the name of a timm model with pretrained weights.
        criterion: (logits, target) -> loss, replaces the cross-entropy.
        student_taps, teacher_taps: as in `create_extractor`; by default four taps each.
        image_size: image size in pixels; by default the student's own.
        alpha, beta, kd_temperature: as in `Distiller`.
        lfcc_options: arguments of `LFCCLoss`, e.g. {"scales": (1, 2)}.
        device, dtype, verbose: as in timm's tasks.

    Raises ValueError for a teacher that cannot be created, or for taps that do not exist or do not match.
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: nn.Module | str,
        criterion: nn.Module | None = None,
        *,
        student_taps: Sequence[int | str] | None = None,
        teacher_taps: Sequence[int | str] | None = None,
        image_size: int | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        kd_temperature: float = 4.0,
        lfcc_options: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        size = image_size or resolve_data_config(model=student_model)["input_size"][-1]
        if isinstance(teacher_model, str):
            teacher_model = create_model(teacher_model, image_size=size, pretrained=True)
        student = create_extractor(student_model, student_taps, image_size=size)
        to_teacher = TeacherInput(student_model, teacher_model, size)
        teacher = create_extractor(teacher_model, teacher_taps, image_size=size, preprocess=to_teacher)
        lfcc = build_lfcc(student, teacher, **(lfcc_options or {})) if beta else None
        # Without the teacher, since `setup_ema` copies this module.
        self.trainable_module: nn.Module = Distiller(
            student, None, lfcc, alpha=alpha, beta=beta, kd_temperature=kd_temperature
        )
        self.trainable_module.to(self.device)
        self.teacher = teacher.to(self.device, self.dtype).eval().requires_grad_(False)
        self.criterion = criterion
        if verbose:
            pairs = zip(student.taps, teacher.taps, strict=True)
            _logger.info("LFCC from %s", ", ".join(f"{t.module} to {s.module}" for s, t in pairs))

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses of images (B, 3, H, W) with class labels (B,), or with probabilities (B, classes) of mixup or CutMix.

        Returns "loss", the logits as "output" (B, classes), and the terms "ce", "kd" and "lfcc" whose weight is not 0.
        If targets are probabilities, images i and B-1-i, which timm mixes, are not negatives of each other.
        """
        labels = target if self.criterion is None else target.new_full((len(target),), -100, dtype=torch.int64)
        size = len(target)
        ids = mirror_ids(rank() * size, size, target.device) if target.is_floating_point() else None
        terms = self.trainable_module(input, labels, self._teacher_outputs(input), ids)
        result = {"output": terms.pop("logits"), **terms}
        if self.criterion is not None:
            result["ce"] = self.criterion(result["output"], target)
            result["loss"] = result["loss"] + result["ce"]
        return result

    @torch.no_grad()
    def _teacher_outputs(self, images: Tensor) -> TeacherOutputs:
        logits, features = self.teacher(images)
        lfcc = self._distiller().lfcc
        return TeacherOutputs(logits, None if lfcc is None else lfcc.teacher_pyramids(features))

    def train(self, mode: bool = True) -> "LFCCTask":
        """Set the mode of everything except the teacher."""
        super().train(mode)
        self.teacher.eval()
        return self

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> "LFCCTask":
        """Wrap student, projections and losses in DDP. LFCC uses the negatives of all ranks."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile student, losses and teacher; call it before `prepare_distributed`. Returns the compiled student."""
        options = {"backend": backend, "mode": mode, **compile_kwargs}
        self.eval_model = cast(nn.Module, torch.compile(self.get_eval_model(), **options))
        self.trainable_module.compile(**options)
        self.teacher.compile(**options)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The bare student, or its moving average (None without one)."""
        resolved = super().get_eval_model(module=module, ema=ema)
        inner = unwrap_model(resolved)
        return inner.student.model if isinstance(inner, Distiller) else resolved

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Parameters of student, projections and filters; `exclude_head` excludes the student's head."""
        distiller = self._distiller()
        student = list(distiller.student.parameters())
        if exclude_head:
            student = student[:-2]
        return student + ([] if distiller.lfcc is None else list(distiller.lfcc.parameters()))

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, dict[str, Tensor]]:
        """{"lfcc": state of projections and filters}; empty without LFCC."""
        lfcc = self._distiller(module, ema).lfcc
        return {} if lfcc is None else {"lfcc": lfcc.state_dict()}

    def load_task_state(
        self,
        state: Mapping[str, Mapping[str, Tensor]] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load the result of `get_task_state`; None leaves projections and filters unchanged."""
        lfcc = self._distiller(module, ema).lfcc
        if state and lfcc is not None:
            lfcc.load_state_dict(state["lfcc"], strict=strict)

    def _distiller(self, module: nn.Module | None = None, ema: bool = False) -> Distiller:
        return unwrap_model(self.get_trainable_module(ema=ema) if module is None else module)
