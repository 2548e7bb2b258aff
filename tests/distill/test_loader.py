import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader

from lfcc_kernels.distill.loader import EvaluationImages, TrainBatches, top1
from lfcc_kernels.distill.models import TeacherInput

IMAGES = [
    (Image.fromarray(np.random.default_rng(i).integers(0, 255, (24, 24), dtype=np.uint8)), i % 3) for i in range(10)
]
TRANSFORM = create_transform(16, is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.5)


def batches(workers: int = 0, seed: int = 0) -> TrainBatches:
    return TrainBatches(IMAGES, TRANSFORM, batch_size=3, seed=seed, workers=workers)


def drawn(source: TrainBatches, epoch: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels, _ = zip(*source.epoch(epoch, first), strict=True)
    return torch.stack(images), torch.stack(labels)


def test_an_epoch_follows_from_its_number_alone() -> None:
    images, labels = drawn(batches(), epoch=1)
    assert images.shape == (3, 3, 3, 16, 16) and len(batches()) == 3
    source = batches()
    drawn(source, epoch=0)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # the global generators have no say
    again, same_labels = drawn(source, epoch=1)
    assert torch.equal(images, again) and torch.equal(labels, same_labels)
    assert not torch.equal(images, drawn(batches(), epoch=2)[0])
    assert not torch.equal(images, drawn(batches(seed=1), epoch=1)[0])


def test_an_epoch_can_be_taken_up_in_the_middle() -> None:
    images, labels = drawn(batches(), epoch=1)
    rest, rest_labels = drawn(batches(), epoch=1, first=2)
    assert torch.equal(images[2:], rest) and torch.equal(labels[2:], rest_labels)


def test_workers_change_nothing() -> None:
    source = batches(workers=2)
    for epoch in (0, 1):
        assert torch.equal(drawn(source, epoch)[0], drawn(batches(), epoch)[0])


def test_the_global_generators_are_left_alone() -> None:
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    drawn(batches(), epoch=0)
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


def test_every_image_comes_once() -> None:
    plain = create_transform(24, is_training=True, no_aug=True)
    source = TrainBatches(IMAGES, plain, batch_size=5, seed=0)
    means = torch.cat([batch.images.mean((1, 2, 3)) for batch in source.epoch(0)])
    assert len(means.unique()) == len(IMAGES)


def test_top1_counts_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    dataset = EvaluationImages(IMAGES, create_transform(32))
    images, labels = next(iter(DataLoader(dataset, len(IMAGES))))
    accuracy = top1(model, DataLoader(dataset, 4), num_classes=3)
    assert not model.training
    with torch.no_grad():
        expected = (model(images).argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(100 * expected)


def test_the_teacher_sees_its_own_normalisation_and_size() -> None:
    student, teacher = timm.create_model("test_resnet"), timm.create_model("test_vit")
    student.pretrained_cfg = {**student.pretrained_cfg, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    pixels = torch.rand(2, 3, 8, 8)

    def normalised(model: torch.nn.Module) -> torch.Tensor:
        mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        return (pixels - mean) / std

    translate = TeacherInput(student, teacher, image_size=8)
    torch.testing.assert_close(translate(normalised(student)), normalised(teacher))
    assert TeacherInput(student, teacher, image_size=12)(normalised(student)).shape == (2, 3, 12, 12)
