"""Three students with one initialisation: trained on labels, on the teacher's logits too, and on LFCC too."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from images import UNLABELLED, Images, TrainingBatches
from teacher import create_teacher, fit_linear_head, pooled_features, teacher_outputs
from torch import Tensor, nn

from lfcc_kernels.distill import Distiller, FeatureExtractor, FitSettings, RunFolder, build_lfcc, create_extractor, fit


@dataclass(frozen=True)
class Setting:
    """The size of the experiment. Learning rate and weights were tuned in a few trial runs.

    `labelled` of the `pool` images keep their labels. The cross-entropy sees one image in pool/labelled and the
    teacher's terms see all of them, so these terms get the weight pool/labelled. `watched` test images are evaluated
    after every epoch, and all test images at the end.
    """

    labelled: int = 1_000
    pool: int = 20_000
    watched: int = 2_000
    epochs: int = 7
    updates: int = 100
    batch_size: int = 64
    lr: float = 2e-3
    teacher_image_size: int = 96
    scales: tuple[int, ...] = (1, 2, 3)
    seed: int = 0


@dataclass(frozen=True)
class Arm:
    """One student: its run folder and the terms of its loss besides cross-entropy, "kd" and "lfcc"."""

    folder: str
    title: str
    terms: tuple[str, ...]


ARMS = (
    Arm("labels", "labels only", ()),
    Arm("kd", "logit KD", ("kd",)),
    Arm("kd-lfcc", "logit KD + LFCC", ("kd", "lfcc")),
)


@dataclass(frozen=True)
class Outcome:
    """A trained student: predictions (N,) for all test images, and the last row of its summary.csv."""

    arm: Arm
    distiller: Distiller
    predictions: Tensor
    summary: dict[str, float]


def create_student(classes: int, seed: int) -> FeatureExtractor:
    """A Vision Transformer for 32 x 32 pixels: 64 tokens, four blocks, 142,000 parameters."""
    torch.manual_seed(seed)
    model = timm.models.VisionTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=2,
        class_token=False,
        global_pool="avg",
        num_classes=classes,
    )
    return create_extractor(model, image_size=32)


class Experiment:
    """Splits the data, fits the teacher's head and computes its outputs; then `train` trains one arm."""

    def __init__(self, train: Images, test: Images, classes: int, teacher: nn.Module, setting: Setting) -> None:
        self.test, self.classes, self.setting = test, classes, setting
        generator = torch.Generator().manual_seed(setting.seed)
        chosen = torch.randperm(len(train), generator=generator)[: setting.pool]
        self.watched = test.select(torch.arange(min(setting.watched, len(test))))
        self.pool, self.labelled = train.select(chosen), train.select(chosen[: setting.labelled])
        self.pool.labels[setting.labelled :] = UNLABELLED

        student = create_student(classes, setting.seed)
        self.teacher = create_teacher(teacher, student.model, setting.teacher_image_size)
        features = pooled_features(self.teacher, self.labelled.batches(setting.batch_size))
        teacher.classifier = fit_linear_head(features, self.labelled.labels, classes)
        batches = self.pool.batches(setting.batch_size, f"teacher outputs for {len(self.pool):,} images")
        lfcc = build_lfcc(student, self.teacher, scales=setting.scales)
        self.teacher_outputs = teacher_outputs(self.teacher, lfcc, batches)

    def train(self, arm: Arm, output: Path) -> Outcome:
        """Train a student in the run folder `output`/`arm.folder` and predict all test images."""
        setting = self.setting
        student, weight = create_student(self.classes, setting.seed), setting.pool / setting.labelled
        kd, lfcc = ("kd" in arm.terms, "lfcc" in arm.terms)
        distiller = Distiller(
            student,
            lfcc=build_lfcc(student, self.teacher, scales=setting.scales) if lfcc else None,
            alpha=weight if kd else 0,
            beta=weight if lfcc else 0,
            kd_temperature=1,
        )
        shape = {"size": setting.batch_size, "updates": setting.updates, "epochs": setting.epochs}
        if arm.terms:
            teacher = self.teacher_outputs if lfcc else self.teacher_outputs._replace(pyramids=None)
            batches = TrainingBatches(self.pool, **shape, seed=setting.seed, teacher=teacher)
        else:
            batches = TrainingBatches(self.labelled, **shape, seed=setting.seed, augment=True)
        settings = FitSettings(
            epochs=setting.epochs, lr=setting.lr, warmup_epochs=0.3, log_interval=math.ceil(setting.updates / 5)
        )
        summary = fit(
            distiller,
            batches,
            lambda model: accuracy(predict(model, self.watched), self.watched.labels),
            settings,
            RunFolder(output / arm.folder),
            config={"arm": arm.title, **asdict(setting), **asdict(settings)},
        )
        return Outcome(arm, distiller, predict(student.model, self.test), summary)


@torch.no_grad()
def predict(model: nn.Module, images: Images) -> Tensor:
    """The predicted class of each image, (N,). Leaves `model` in evaluation mode; `fit` sets its own mode."""
    model.eval()
    return torch.cat([model(batch).argmax(dim=1) for batch in images.batches(500)])


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in per cent."""
    return 100 * (predictions == labels).double().mean().item()


def compare(first: Tensor, second: Tensor, labels: Tensor) -> tuple[float, float]:
    """Difference of two accuracies in percentage points, and its standard error over these images (paired)."""
    gain = 100 * ((first == labels).double() - (second == labels).double())
    return gain.mean().item(), gain.std().item() / math.sqrt(len(gain))
