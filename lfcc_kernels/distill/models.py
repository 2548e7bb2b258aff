"""Creates timm models for student and teacher, converts the student's images for the teacher, and lists taps."""

import sys
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn

from lfcc_kernels.text import aligned

from .checkpoint import CheckpointError
from .features import available_taps, default_taps


def create_model(name: str, *, image_size: int | None = None, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model` with `img_size=image_size` if the model has that argument.

    Raises ValueError for an unknown name, weights that are not available, or wrong arguments.
    """
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.split('_')[0].split('.')[0]}*")[:5]
        hint = f"did you mean {', '.join(similar)}?" if similar else "timm.list_models() lists the names"
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; {hint}")
    try:
        if image_size is not None:
            try:
                return timm.create_model(name, pretrained=pretrained, img_size=image_size, **kwargs)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:  # depends on the hub, the file system and the model
        hint = "; set --teacher-checkpoint to use local weights" if pretrained else ""
        raise ValueError(f"timm.create_model({name!r}) failed: {str(error) or type(error).__name__}{hint}") from error


def load_teacher(name: str, checkpoint: str | None, num_classes: int, *, image_size: int, **kwargs: Any) -> nn.Module:
    """A pretrained teacher with the number of classes of its weights.

    `checkpoint` is a file of timm or of a run of this package (its moving average if there is one); None means timm's
    pretrained weights. `num_classes` is the fallback if the file has no classifier.
    """
    if checkpoint is None:
        return create_model(name, image_size=image_size, pretrained=True, **kwargs)
    try:
        weights = timm.models.load_state_dict(checkpoint)
    except FileNotFoundError:
        raise FileNotFoundError(f"--teacher-checkpoint {checkpoint} does not exist") from None
    except Exception as error:  # the type depends on the damage
        raise CheckpointError(f"{checkpoint} is damaged or not a checkpoint ({str(error).splitlines()[0]})") from error
    try:
        classifier = timm.models.get_pretrained_cfg_value(name, "classifier") if timm.is_model(name) else None
    except RuntimeError as error:  # a tag that timm does not know
        raise ValueError(f"--teacher {name}: {error}") from error
    head = weights.get(f"{classifier}.weight")
    model = create_model(name, image_size=image_size, num_classes=num_classes if head is None else len(head), **kwargs)
    # Converts parameter names of older timm versions, as timm does for its own files.
    update_names = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda weights, model: weights)
    try:
        model.load_state_dict(update_names(weights, model))
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint} does not match {name}: {str(error)[:300]}") from error
    return model


class TeacherInput(nn.Module):
    """Converts images (B, 3, H, W) from the student's normalization to that of the teacher, and to its image size."""

    def __init__(self, student: nn.Module, teacher: nn.Module, image_size: int) -> None:
        super().__init__()
        old, new = resolve_data_config(model=student), resolve_data_config(model=teacher)
        self.register_buffer("scale", _channels(old["std"]) / _channels(new["std"]))
        self.register_buffer("shift", (_channels(old["mean"]) - _channels(new["mean"])) / _channels(new["std"]))
        self.image_size = image_size

    def forward(self, images: Tensor) -> Tensor:
        images = images * self.scale + self.shift
        if images.shape[-1] == self.image_size:
            return images
        return F.interpolate(images, size=(self.image_size,) * 2, mode="bicubic", antialias=True)


def check_classes(dataset: str, train: Sequence[str], val: Sequence[str], teacher_head: int | None) -> None:
    """Raises ValueError if training set, validation set and teacher have different classes."""
    if list(train) != list(val):
        raise ValueError(
            f"{dataset}: the training split has {len(train)} classes but the validation split has {len(val)} other ones"
        )
    if teacher_head not in (None, len(train)):
        raise ValueError(
            f"the teacher has {teacher_head} classes but {dataset} has {len(train)}: set --teacher-checkpoint to "
            "weights for these classes, or disable logit KD with --kd-alpha 0"
        )


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def inspect_model(name: str, image_size: int | None = None) -> str:
    """A table of the taps of a timm model: channels, grid, stride, layout; a star marks the default taps."""
    model = create_model(name, image_size=image_size)
    size = resolve_data_config({"img_size": image_size}, model=model)["input_size"][-1]
    taps = available_taps(model, size)
    chosen = default_taps(taps)
    rows = [("tap", "module", "channels", "grid", "stride", "layout")]
    rows += [
        (
            f"{tap.name}{'*' if tap in chosen else ''}",
            tap.module,
            str(tap.channels),
            f"{tap.grid[0]} x {tap.grid[1]}",
            f"{size / tap.grid[0]:.4g}",
            tap.layout,
        )
        for tap in taps
    ]
    return "\n".join(
        [
            f"{name} at {size} x {size} pixels: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M "
            f"parameters, {taps[0].prefix_tokens} prefix tokens (removed from the features)",
            *aligned(rows, left=len(rows[0])),
            "* default taps of `lfcc distill`",
        ]
    )
