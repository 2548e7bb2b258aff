"""Pictures of what the students have learned, for the report page."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from lfcc_kernels.distill.report import Picture

from .experiment import Experiment, Outcome

_STAGE = 2  # of four, at stride 16 of the teacher
_GALLERY = 256  # test images among which a student looks for the teacher's view of its own


def predictions(experiment: Experiment, outcomes: Sequence[Outcome], classes: Sequence[str]) -> Picture:
    """The first test images with what each student takes them for."""
    count = 10
    figure = Figure(figsize=(10, 2), layout="constrained")
    for index, axes in enumerate(figure.subplots(1, count)):
        truth = experiment.test.labels[index]
        axes.imshow(experiment.test.pixels[index].permute(1, 2, 0).numpy())
        axes.set_title(classes[truth], fontsize=9, fontweight="bold")
        axes.axis("off")
        for line, outcome in enumerate(outcomes):
            guess = outcome.predictions[index]
            style = {"y": -0.2 - 0.24 * line, "transform": axes.transAxes, "fontsize": 9}
            color = "tab:green" if guess == truth else "tab:red"
            axes.text(x=0.5, s=classes[guess], ha="center", color=color, **style)
            if index == 0:
                axes.text(x=-0.2, s=outcome.arm.title, ha="right", **style)
    caption = f"The first {count} test photographs as they come: the class above, what each student says below."
    return Picture("predictions", "What the students say", caption, figure)


@torch.no_grad()
def low_frequencies(experiment: Experiment, outcome: Outcome) -> list[Picture]:
    """Teacher and student of the LFCC arm side by side in the compact space, on test images."""
    images = next(experiment.test.batches(_GALLERY))
    lfcc = outcome.distiller.lfcc.eval()
    teacher = lfcc.teacher_pyramids(experiment.teacher(images)[1])[_STAGE]
    student = lfcc.student_pyramids(outcome.distiller.student.eval()(images)[1])[_STAGE]
    return [_pyramids(experiment, teacher, student), _similarities(experiment, teacher, student)]


def _pyramids(experiment: Experiment, teacher: Tensor, student: Tensor) -> Picture:
    rows, scales = 6, experiment.setting.scales
    pixels = experiment.test.pixels[:rows].float() / 255
    teacher, student = (_by_scale(side[:rows], scales) for side in _colors(teacher, student))
    columns = [("photograph", pixels)]
    for scale, taught, learned in reversed(list(zip(scales, teacher, student, strict=True))):
        columns += [
            (f"pixels {scale}x{scale}", F.adaptive_avg_pool2d(pixels, scale)),
            ("teacher", taught.transpose(1, 2).unflatten(2, (scale, scale))),
            ("student", learned.transpose(1, 2).unflatten(2, (scale, scale))),
        ]
    figure = Figure(figsize=(10, 1.1 * rows), layout="constrained")
    for column, (title, maps) in zip(figure.subplots(rows, len(columns)).T, columns, strict=True):
        column[0].set_title(title, fontsize=9)
        for axes, image in zip(column, maps, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.axis("off")
    caption = (
        "Low-pass pyramids of test photographs: of the pixels, of the teacher's third stage and of the "
        "student's in the same compact space. Colors are three main directions of the teacher's features: "
        "where the two sides agree, so do the colors."
    )
    return Picture("pyramids", "What is compared: low frequencies", caption, figure)


def _colors(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Cells (N, cells, C) along the teacher's three main directions, (N, cells, 3) in [0, 1]."""
    sides = [F.normalize(side, dim=2) for side in (teacher, student)]
    taught, learned = (side - side.mean(dim=(0, 1)) for side in sides)
    cells = taught.flatten(0, 1)
    directions = torch.linalg.eigh(cells.T @ cells).eigenvectors[:, -3:]
    shown = (side @ directions for side in (taught, learned))
    return tuple((0.5 + side / (5 * side.std(dim=(0, 1)))).clamp(0, 1) for side in shown)


def _by_scale(cells: Tensor, scales: Sequence[int]) -> tuple[Tensor, ...]:
    return cells.split([scale * scale for scale in scales], dim=1)


def _similarities(experiment: Experiment, teacher: Tensor, student: Tensor) -> Picture:
    shown, scales = 40, experiment.setting.scales
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    sides = zip(scales, _by_scale(teacher, scales), _by_scale(student, scales), strict=True)
    for axes, (scale, taught, learned) in zip(figure.subplots(1, len(scales)), sides, strict=True):
        similarity = F.normalize(learned.flatten(1)) @ F.normalize(taught.flatten(1)).T
        found = (similarity.argmax(dim=1) == torch.arange(len(similarity))).double().mean()
        axes.imshow(similarity[:shown, :shown].numpy())
        axes.set(xlabel="teacher's view of image", ylabel="student's view of image", xticks=[], yticks=[])
        axes.set_title(f"scale {scale}x{scale}: finds its own in {found:.0%}")
    caption = (
        f"Cosine similarity of the first {shown} test images; a bright diagonal says that the student sees "
        "an image as the teacher sees the same one. Above: how often its nearest among "
        f"{len(teacher)} is its own; chance finds {1 / len(teacher):.1%}."
    )
    return Picture("similarities", "Who finds whom", caption, figure)
