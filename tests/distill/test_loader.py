"""Training batches of map-style data sets: order, mixing, teacher cache, ranks, and errors."""

import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import Mixup, create_transform

from lfcc_kernels.distill.data import open_dataset
from lfcc_kernels.distill.data.loader import PairMixup, TrainBatches
from lfcc_kernels.distill.data.readers import LoaderError, loader_errors
from lfcc_kernels.distill.distiller import TeacherOutputs
from lfcc_kernels.distill.models import TeacherInput

IMAGES = [
    (Image.fromarray(np.random.default_rng(i).integers(0, 255, (24, 24), dtype=np.uint8)), i % 3) for i in range(10)
]
TRANSFORM = create_transform(16, is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.5)
PLAIN = create_transform(24, is_training=True, no_aug=True)


def batches(workers: int = 0, seed: int = 0, batch_size: int = 3, **options) -> TrainBatches:
    return TrainBatches(IMAGES, TRANSFORM, batch_size=batch_size, seed=seed, workers=workers, **options)


def drawn(source: TrainBatches, epoch: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels, *_ = zip(*source.epoch(epoch, first), strict=True)
    return torch.stack(images), torch.stack(labels)


def mixup(**options) -> Mixup:
    return Mixup(**{"mixup_alpha": 1.0, "label_smoothing": 0.0, "num_classes": 3, **options})


def test_an_epoch_depends_on_seed_and_number_only() -> None:
    images, labels = drawn(batches(), epoch=1)
    assert images.shape == (3, 3, 3, 16, 16) and len(batches()) == 3
    source = batches()
    drawn(source, epoch=0)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # the global generators must not matter
    again, same_labels = drawn(source, epoch=1)
    assert torch.equal(images, again) and torch.equal(labels, same_labels)
    assert not torch.equal(images, drawn(batches(), epoch=2)[0])
    assert not torch.equal(images, drawn(batches(seed=1), epoch=1)[0])


@pytest.mark.parametrize("options", [{}, {"rank": 1, "world_size": 2}, {"mix": mixup(cutmix_alpha=1.0)}])
def test_an_epoch_can_start_in_the_middle(options: dict) -> None:
    images, labels = drawn(batches(batch_size=2, **options), epoch=1)
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    rest, rest_labels = drawn(batches(batch_size=2, **options), epoch=1, first=1)
    assert torch.equal(images[1:], rest) and torch.equal(labels[1:], rest_labels)
    assert (random.random(), np.random.rand(), torch.rand(())) == expected  # the global generators are not advanced


def test_workers_do_not_change_the_batches() -> None:
    source = batches(workers=2)
    for epoch in (0, 1):
        assert torch.equal(drawn(source, epoch)[0], drawn(batches(), epoch)[0])


def test_every_image_is_returned_once() -> None:
    source = TrainBatches(IMAGES, PLAIN, batch_size=5, seed=0)
    means = torch.cat([batch.images.mean((1, 2, 3)) for batch in source.epoch(0)])
    assert len(means.unique()) == len(IMAGES)


@pytest.mark.parametrize("world_size", [2, 3])
def test_batches_of_all_ranks_are_those_of_one_process(world_size: int) -> None:
    alone = [batches(batch_size=2 * world_size).epoch(epoch=1)]
    ranks = [batches(batch_size=2, rank=rank, world_size=world_size).epoch(epoch=1) for rank in range(world_size)]
    number = 0
    for whole, *parts in zip(*alone, *ranks, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
        number += 1
    assert number == len(batches(batch_size=2, world_size=world_size)) == len(IMAGES) // (2 * world_size)


@pytest.mark.parametrize("mix", [mixup(), mixup(mode="elem"), mixup(mode="pair")])
def test_equal_ids_are_the_two_images_that_were_mixed(mix: Mixup) -> None:
    """Each mixed image is lam * x_i + (1 - lam) * x_j, with lam from its label and j the other image with its id."""
    images = [(image, label) for label, (image, _) in enumerate(IMAGES[:8])]
    mix.num_classes = len(images)
    plain = TrainBatches(images, PLAIN, batch_size=4, seed=3)
    for batch, unmixed in zip(
        TrainBatches(images, PLAIN, batch_size=4, seed=3, mix=mix).epoch(0), plain.epoch(0), strict=True
    ):
        assert batch.labels.shape == (4, 8) and batch.labels.dtype == torch.float32 and unmixed.ids is None
        for i in range(4):
            (j,) = [j for j in range(4) if j != i and batch.ids[j] == batch.ids[i]]
            lam, rest = batch.labels[i, unmixed.labels[i]], batch.labels[i, unmixed.labels[j]]
            torch.testing.assert_close(lam + rest, torch.tensor(1.0))
            torch.testing.assert_close(batch.images[i], lam * unmixed.images[i] + rest * unmixed.images[j])
        assert not torch.allclose(batch.images, unmixed.images)


def test_an_id_belongs_to_one_pair_of_an_epoch() -> None:
    images = IMAGES + IMAGES[:6]
    ids = [
        batch.ids
        for rank in range(2)
        for batch in TrainBatches(images, PLAIN, batch_size=4, seed=0, rank=rank, world_size=2, mix=mixup()).epoch(0)
    ]
    # In the order of the epoch, rank 0 has 0..3 and 8..11, rank 1 the others.
    assert torch.stack(ids).tolist() == [[0, 1, 1, 0], [8, 9, 9, 8], [4, 5, 5, 4], [12, 13, 13, 12]]


def test_mixing_differs_by_seed_epoch_batch_and_rank() -> None:
    def share(seed: int = 0, epoch: int = 0, batch: int = 0, rank: int = 0) -> float:
        mix = PairMixup(mixup(num_classes=2), batch_size=2, seed=seed, rank=rank, world_size=2)
        return mix(torch.zeros(2, 3, 4, 4), torch.arange(2), epoch=epoch, batch=batch).labels[0, 0].item()

    assert share() == share()
    assert len({share(), share(seed=1), share(epoch=1), share(batch=1), share(rank=1)}) == 5


class Rows:
    """A teacher cache whose rows are (index, flipped)."""

    def __init__(self, flips: bool = True) -> None:
        self.flips = flips

    def row(self, index: int, flipped: bool) -> torch.Tensor:
        return torch.tensor([index, float(flipped)])

    def outputs(self, rows: torch.Tensor) -> TeacherOutputs:
        return TeacherOutputs(rows, None)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_the_cached_rows_of_their_images(workers: int) -> None:
    source = TrainBatches(IMAGES, PLAIN, batch_size=5, seed=0, workers=workers, cache=Rows(), hflip=0.5)
    seen = []
    for batch in source.epoch(0):
        for image, (index, flipped) in zip(batch.images, batch.teacher.logits.tolist(), strict=True):
            expected = PLAIN(IMAGES[int(index)][0].convert("RGB"))
            assert torch.equal(image, expected.flip(-1) if flipped else expected)
            seen.append((index, flipped))
    assert sorted(index for index, _ in seen) == list(range(10))
    assert 0 < sum(flipped for _, flipped in seen) < 10
    never = TrainBatches(IMAGES, PLAIN, batch_size=5, seed=0, cache=Rows(flips=False))
    assert not any(batch.teacher.logits[:, 1].any() for batch in never.epoch(0))


def test_invalid_combinations_raise() -> None:
    with pytest.raises(ValueError, match=r"batch_size is 3; .* it must be even"):
        batches(mix=mixup())
    with pytest.raises(ValueError, match="no mixed images: omit mixup and cutmix, or the cache"):
        batches(batch_size=2, mix=mixup(), cache=Rows())
    with pytest.raises(ValueError, match="no flipped images: set hflip to 0"):
        batches(cache=Rows(flips=False), hflip=0.5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_raises(workers: int, tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        (tmp_path / "train" / "cat").mkdir(parents=True, exist_ok=True)
        IMAGES[0][0].save(tmp_path / "train" / "cat" / name)
    broken = tmp_path / "train" / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    images = open_dataset("folder", tmp_path, "train")
    with pytest.raises(LoaderError, match=rf"^image {broken} cannot be read: .+\Z"):  # one line
        list(TrainBatches(images, PLAIN, batch_size=2, seed=0, workers=workers).epoch(0))


class Killing:
    """Images of which one kills the process that reads it, as Linux does without memory."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return IMAGES[index]


def test_a_killed_worker_raises() -> None:
    with pytest.raises(LoaderError, match=r"died \(.*pid.*\): .* lower --workers") as caught:
        list(TrainBatches(Killing(), PLAIN, batch_size=2, seed=0, workers=2).epoch(0))
    assert isinstance(caught.value, OSError) and "\n" not in str(caught.value)


def test_only_errors_of_the_loader_are_converted() -> None:
    worker = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    full = (
        f"{worker}RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
    )
    with pytest.raises(LoaderError, match=r"unable to allocate shared memory.*/dev/shm"), loader_errors():
        raise RuntimeError(full)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), loader_errors():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_images_of_the_teacher_have_its_normalisation_and_size() -> None:
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
