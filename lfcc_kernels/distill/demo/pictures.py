"""Pictures of what the students have learned, for the report page."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from lfcc_kernels.distill.report import Picture

from .experiment import Experiment, Outcome

_STAGE = 3  # of the four: the deepest
_GALLERY = 256  # test images among which a student looks for the teacher's view of its own


def predictions(experiment: Experiment, outcomes: Sequence[Outcome], classes: Sequence[str]) -> Picture:
    """The first test images with what each student takes them for."""
    count = 10
    figure = Figure(figsize=(10, 1.6), layout="constrained")
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
    caption = (
        f"The first {count} test photographs as they come: the class above, what each student says below."
    )
    return Picture("predictions", "What the students say", caption, figure)


@torch.no_grad()
def low_frequencies(experiment: Experiment, outcome: Outcome) -> list[Picture]:
    """Teacher and student of the LFCC arm side by side in the compact space, on test images."""
    images = next(experiment.test.batches(_GALLERY))
    lfcc = outcome.distiller.lfcc.eval()
    teacher = lfcc.teacher_pyramids(experiment.teacher(images)[1])[_STAGE]
    student = lfcc.student_pyramids(outcome.distiller.student.eval()(images)[1])[_STAGE]
    cells = [scale * scale for scale in experiment.setting.scales]
    scales = list(
        zip(experiment.setting.scales, teacher.split(cells, dim=1), student.split(cells, dim=1), strict=True)
    )
    return [_pyramids(experiment, scales), _similarities(scales)]


def _pyramids(experiment: Experiment, scales: Sequence[tuple[int, Tensor, Tensor]]) -> Picture:
    rows = 6
    figure = Figure(figsize=(10, 1.1 * rows), layout="constrained")
    grid = figure.subplots(rows, 1 + 3 * len(scales))
    pixels = experiment.test.pixels[:rows].float() / 255
    columns: list[tuple[str, Tensor]] = [("photograph", pixels)]
    finest_first = scales[::-1]
    columns += [(f"pixels {s}x{s}", F.adaptive_avg_pool2d(pixels, s)) for s, _, _ in finest_first]
    colors = [(s, *_colors(teacher, student)) for s, teacher, student in finest_first]
    columns += [(f"teacher {s}x{s}", _as_map(teacher[:rows], s)) for s, teacher, _ in colors]
    columns += [(f"student {s}x{s}", _as_map(student[:rows], s)) for s, _, student in colors]
    for column, (title, maps) in zip(grid.T, columns, strict=True):
        column[0].set_title(title, fontsize=9)
        for axes, image in zip(column, maps, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.axis("off")
    caption = (
        "Low-pass pyramids of test photographs: of the pixels, of the teacher's deepest features and of the "
        "student's in the same compact space. Colors are three main directions of the teacher's features: "
        "where the two sides agree, so do the colors."
    )
    return Picture("pyramids", "What is compared: low frequencies", caption, figure)


def _colors(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Unit pyramids (N, cells, C) along the teacher's three main directions, (N, cells, 3) in [0, 1]."""
    sides = [F.normalize(side.flatten(1)).view_as(side) for side in (teacher, student)]
    teacher, student = (side - side.mean(dim=0) for side in sides)
    cells = teacher.flatten(0, 1)
    directions = torch.linalg.eigh(cells.T @ cells).eigenvectors[:, -3:]
    shown = [side @ directions for side in (teacher, student)]
    return tuple((0.5 + side / (5 * side.std(dim=(0, 1)))).clamp(0, 1) for side in shown)


def _as_map(cells: Tensor, scale: int) -> Tensor:
    return cells.transpose(1, 2).unflatten(2, (scale, scale))


def _similarities(scales: Sequence[tuple[int, Tensor, Tensor]]) -> Picture:
    shown = 40
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, (scale, teacher, student) in zip(figure.subplots(1, len(scales)), scales, strict=True):
        similarity = F.normalize(student.flatten(1)) @ F.normalize(teacher.flatten(1)).T
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
