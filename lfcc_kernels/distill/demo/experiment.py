"""Three students of one start: of labels alone, of the teacher's logits, and of its low frequencies too."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from lfcc_kernels import LFCCLoss
from lfcc_kernels.distill import (
    Distiller,
    FeatureExtractor,
    FitSettings,
    RunFolder,
    TeacherOutputs,
    build_lfcc,
    create_extractor,
    fit,
)
from lfcc_kernels.distill.models import TeacherInput

from .images import UNLABELLED, Images, TrainingBatches
from .teacher import fit_linear_head, pooled_features, teach_all


@dataclass(frozen=True)
class Setting:
    """The size of the experiment. Its weights and learning rate were fixed after a few trial runs.

    `labelled` of the `pool` images keep their labels. Cross-entropy hears one image in pool/labelled, the
    teacher's terms hear all and are weighed accordingly, so that an image counts the same with a label and
    without. `watched` test images are judged after every epoch, all of them at the end.
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

    @property
    def weight(self) -> float:
        """Of each of the teacher's terms."""
        return self.pool / self.labelled


@dataclass(frozen=True)
class Arm:
    """A student to train: the folder of its run, and what it learns from beside labels, "kd" and "lfcc"."""

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
    """A trained student: its predictions (N,) for all test images, and the last row of its summary.csv."""

    arm: Arm
    distiller: Distiller
    predictions: Tensor
    summary: dict[str, float]


def create_student(classes: int, seed: int) -> FeatureExtractor:
    """A Vision Transformer of 64 tokens and four blocks, 142,000 parameters, for 32 x 32 pixels."""
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
    """The split, the teacher and what it says of the pool; then `train` an arm."""

    def __init__(self, train: Images, test: Images, classes: int, teacher: nn.Module, setting: Setting) -> None:
        self.test, self.classes, self.setting = test, classes, setting
        generator = torch.Generator().manual_seed(setting.seed)
        chosen = torch.randperm(len(train), generator=generator)[: setting.pool]
        self.watched = test.select(torch.arange(min(setting.watched, len(test))))
        self.pool = train.select(chosen)
        self.labelled = train.select(chosen[: setting.labelled])
        self.pool.labels[setting.labelled :] = UNLABELLED
        self._teach(teacher)

    def _teach(self, model: nn.Module) -> None:
        setting = self.setting
        student = create_student(self.classes, setting.seed)
        model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.teacher = create_extractor(
            model,
            [1, 2, 3, 4],
            image_size=setting.teacher_image_size,
            preprocess=TeacherInput(student.model, model, setting.teacher_image_size),
        )
        features = pooled_features(self.teacher, self.labelled.batches(setting.batch_size))
        model.classifier = fit_linear_head(features, self.labelled.labels, self.classes).requires_grad_(False)
        lfcc = self._create_lfcc(student)
        batches = self.pool.batches(setting.batch_size, f"teacher looks at {len(self.pool):,} photographs")
        self.taught = teach_all(self.teacher, lfcc, batches)

    def _create_lfcc(self, student: FeatureExtractor) -> LFCCLoss:
        return build_lfcc(student, self.teacher, scales=self.setting.scales)

    def train(self, arm: Arm, output: Path) -> Outcome:
        """Train a student in the run folder `output`/`arm.folder`, then judge it by all test images."""
        setting = self.setting
        student = create_student(self.classes, setting.seed)
        distiller = Distiller(
            student,
            lfcc=self._create_lfcc(student) if "lfcc" in arm.terms else None,
            alpha=setting.weight if "kd" in arm.terms else 0,
            beta=setting.weight if "lfcc" in arm.terms else 0,
            kd_temperature=1,
        )
        settings = FitSettings(
            epochs=setting.epochs,
            lr=setting.lr,
            warmup_epochs=0.3,
            log_interval=math.ceil(setting.updates / 5),
        )
        summary = fit(
            distiller,
            self._batches(arm),
            lambda model: accuracy(model, self.watched),
            settings,
            RunFolder(output / arm.folder),
            config={"arm": arm.title, **asdict(setting), **asdict(settings)},
        )
        return Outcome(arm, distiller, predict(student.model, self.test), summary)

    def _batches(self, arm: Arm) -> TrainingBatches:
        setting = self.setting
        shape = {"size": setting.batch_size, "updates": setting.updates, "epochs": setting.epochs}
        if not arm.terms:
            return TrainingBatches(self.labelled, **shape, seed=setting.seed, augment=True)
        # The teacher saw every image once, as it is, so its students get them unchanged.
        taught = TeacherOutputs(self.taught.logits, self.taught.pyramids if "lfcc" in arm.terms else None)
        return TrainingBatches(self.pool, **shape, seed=setting.seed, teacher=taught)


@torch.no_grad()
def predict(model: nn.Module, images: Images) -> Tensor:
    """The class of each image, (N,). Leaves `model` in evaluation mode; `fit` sets its own."""
    model.eval()
    return torch.cat([model(batch).argmax(dim=1) for batch in images.batches(500)])


def accuracy(model: nn.Module, images: Images) -> float:
    """In per cent."""
    return 100 * (predict(model, images) == images.labels).double().mean().item()


def compare(first: Tensor, second: Tensor, labels: Tensor) -> tuple[float, float]:
    """How many points of accuracy `first` is ahead of `second`, and the standard error over these images."""
    gain = 100 * ((first == labels).double() - (second == labels).double())
    return gain.mean().item(), gain.std().item() / math.sqrt(len(gain))


def rank(outcomes: Sequence[Outcome], labels: Tensor) -> list[Outcome]:
    """Best first."""
    return sorted(outcomes, key=lambda outcome: (outcome.predictions == labels).sum().item(), reverse=True)
