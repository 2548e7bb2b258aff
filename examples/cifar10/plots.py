"""Plots of the students' predictions and features for the report."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from experiment import Experiment, Outcome
from matplotlib.figure import Figure
from torch import Tensor

from lfcc_kernels.distill.report import Picture

STAGE = 2  # third of four feature layers, at stride 16 of the teacher
GALLERY = 256  # number of test images for retrieval


def predictions(experiment: Experiment, outcomes: Sequence[Outcome], classes: Sequence[str]) -> Picture:
    """The first test images with the predictions of each student."""
    count = 10
    figure = Figure(figsize=(10, 2), layout="constrained")
    for index, axes in enumerate(figure.subplots(1, count)):
        truth = experiment.test.labels[index]
        axes.imshow(experiment.test.pixels[index].permute(1, 2, 0).numpy())
        axes.set_title(classes[truth], fontsize=9, fontweight="bold")
        axes.axis("off")
        for line, outcome in enumerate(outcomes):
            predicted = outcome.predictions[index]
            style = {"y": -0.2 - 0.24 * line, "transform": axes.transAxes, "fontsize": 9}
            color = "tab:green" if predicted == truth else "tab:red"
            axes.text(x=0.5, s=classes[predicted], ha="center", color=color, **style)
            if index == 0:
                axes.text(x=-0.2, s=outcome.arm.title, ha="right", **style)
    caption = f"The first {count} test images: label above, each student's prediction below (green if correct)."
    return Picture("predictions", "Predictions", caption, figure)


@torch.no_grad()
def low_frequencies(experiment: Experiment, outcome: Outcome) -> list[Picture]:
    """Pyramids of teacher and student in the compact space on test images, and retrieval between them."""
    images = next(experiment.test.batches(GALLERY))
    lfcc = outcome.distiller.lfcc.eval()
    teacher = lfcc.teacher_pyramids(experiment.teacher(images)[1])[STAGE]
    student = lfcc.student_pyramids(outcome.distiller.student.eval()(images)[1])[STAGE]
    return [_pyramids(experiment, teacher, student), _retrieval(experiment, teacher, student)]


def _pyramids(experiment: Experiment, teacher: Tensor, student: Tensor) -> Picture:
    rows, scales = 6, experiment.setting.scales
    pixels = experiment.test.pixels[:rows].float() / 255
    sides = (_by_scale(side[:rows], scales) for side in _colors(teacher, student))
    columns = [("image", pixels)]
    for scale, *pyramids in reversed(list(zip(scales, *sides, strict=True))):
        maps = [cells.transpose(1, 2).unflatten(2, (scale, scale)) for cells in pyramids]
        titles = (f"pixels {scale}x{scale}", "teacher", "student")
        columns += zip(titles, (F.adaptive_avg_pool2d(pixels, scale), *maps), strict=True)
    figure = Figure(figsize=(10, 1.1 * rows), layout="constrained")
    for column, (title, maps) in zip(figure.subplots(rows, len(columns)).T, columns, strict=True):
        column[0].set_title(title, fontsize=9)
        for axes, image in zip(column, maps, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.axis("off")
    caption = (
        "Low-pass pyramids of test images: of the pixels, of the teacher's third feature layer and of the student's in "
        "the same compact space. The colors are the three principal components of the teacher's features; equal colors "
        "mean equal features."
    )
    return Picture("pyramids", "Low-pass pyramids of teacher and student", caption, figure)


def _colors(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Cells (N, cells, C) projected on three principal components of the teacher, (N, cells, 3) in [0, 1]."""
    teacher, student = (F.normalize(side, dim=2) for side in (teacher, student))
    teacher, student = (side - side.mean(dim=(0, 1)) for side in (teacher, student))
    cells = teacher.flatten(0, 1)
    components = torch.linalg.eigh(cells.T @ cells).eigenvectors[:, -3:]
    shown = (side @ components for side in (teacher, student))
    return tuple((0.5 + side / (5 * side.std(dim=(0, 1)))).clamp(0, 1) for side in shown)


def _by_scale(cells: Tensor, scales: Sequence[int]) -> tuple[Tensor, ...]:
    return cells.split([scale * scale for scale in scales], dim=1)


def _retrieval(experiment: Experiment, teacher: Tensor, student: Tensor) -> Picture:
    shown, scales = 40, experiment.setting.scales
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    sides = zip(scales, _by_scale(teacher, scales), _by_scale(student, scales), strict=True)
    for axes, (scale, keys, queries) in zip(figure.subplots(1, len(scales)), sides, strict=True):
        similarity = F.normalize(queries.flatten(1)) @ F.normalize(keys.flatten(1)).T
        top1 = 100 * (similarity.argmax(dim=1) == torch.arange(len(similarity))).double().mean()
        image = axes.imshow(similarity[:shown, :shown].numpy())
        figure.colorbar(image, ax=axes, shrink=0.8, label="cosine similarity")
        axes.set(xlabel="teacher features of image", ylabel="student features of image", xticks=[], yticks=[])
        axes.set_title(f"scale {scale}x{scale}: top-1 retrieval {top1:.0f} %")
    caption = (
        f"Cosine similarity between student and teacher features of the first {shown} test images; matching images are "
        f"on the diagonal. Top-1 retrieval: how often the nearest of {len(teacher)} teacher features belongs to the "
        f"same image (chance: {100 / len(teacher):.1f} %)."
    )
    return Picture("similarities", "Retrieval of teacher features by student features", caption, figure)
