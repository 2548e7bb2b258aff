"""timm models by name for student and teacher, and the way from the student's images to the teacher's."""

import sys
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn

from .checkpoint import CheckpointError


def create_model(name: str, *, image_size: int | None = None, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model` for `image_size`, which a convolutional network does not ask for.

    Raises ValueError for a name that timm does not know, weights that cannot be had or arguments that do not
    fit.
    """
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.split('_')[0].split('.')[0]}*")[:5]
        hint = f"did you mean {', '.join(similar)}?" if similar else "timm.list_models() has the names"
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; {hint}")
    try:
        if image_size is not None:
            try:
                return timm.create_model(name, pretrained=pretrained, img_size=image_size, **kwargs)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:  # the hub, the file system and every model have errors of their own
        mend = "; give the weights with --teacher-checkpoint" if pretrained else ""
        raise ValueError(f"{name} cannot be made: {str(error) or type(error).__name__}{mend}") from error


def load_teacher(name: str, checkpoint: str | None, num_classes: int, *, image_size: int, **kwargs: Any) -> nn.Module:
    """A pretrained teacher with the head that its weights have.

    `checkpoint` is a file of timm or of a run of this package (its moving average if there is one); None
    takes timm's pretrained weights. `num_classes` serves where the head cannot be told from the file.
    """
    if checkpoint is None:
        return create_model(name, image_size=image_size, pretrained=True, **kwargs)
    try:
        weights = timm.models.load_state_dict(checkpoint)
    except FileNotFoundError:
        raise FileNotFoundError(f"no teacher checkpoint at {checkpoint}") from None
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise CheckpointError(f"{checkpoint} is damaged or no checkpoint ({str(error).splitlines()[0]})") from error
    try:
        classifier = timm.models.get_pretrained_cfg_value(name, "classifier") if timm.is_model(name) else None
    except RuntimeError as error:  # a tag that timm does not know
        raise ValueError(f"--teacher {name}: {error}") from error
    head = weights.get(f"{classifier}.weight")
    model = create_model(name, image_size=image_size, num_classes=num_classes if head is None else len(head), **kwargs)
    # Brings the names of older versions of timm up to date, as timm does for its own files.
    update_names = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda weights, model: weights)
    try:
        model.load_state_dict(update_names(weights, model))
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint} does not fit {name}: {str(error)[:300]}") from error
    return model


class TeacherInput(nn.Module):
    """Turns images (B, 3, H, W) normalised for the student into the teacher's: its mean, spread and size."""

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
    """Raises ValueError where training set, validation set and teacher do not have the same classes."""
    if list(train) != list(val):
        raise ValueError(f"{dataset} has {len(train)} classes for training and {len(val)} others for validation")
    if teacher_head not in (None, len(train)):
        raise ValueError(
            f"the teacher's head has {teacher_head} classes and {dataset} has {len(train)}: give a "
            "--teacher-checkpoint trained on these classes, or leave its logits out with --kd-alpha 0"
        )


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)
