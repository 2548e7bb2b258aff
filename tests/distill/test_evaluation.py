"""Every validation image is counted once for any number of ranks."""

import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn
from toy_runs import write_tar

from lfcc_kernels.distill.data import ImageArrays, open_dataset
from lfcc_kernels.distill.data.evaluation import evaluation_loader, top1
from lfcc_kernels.distill.data.readers import LoaderError
from lfcc_kernels.distill.distributed import rank, world_size
from tests.gloo import in_ranks

NUMBER = 11
PIXELS = np.random.default_rng(0).integers(0, 256, (NUMBER, 16, 16, 3), dtype=np.uint8)
LABELS = np.arange(NUMBER) % 3
IMAGES = ImageArrays(PIXELS, LABELS, "abc")
TRANSFORM = create_transform(16, crop_pct=1.0)


class Brightness(nn.Module):
    """A classifier that is right for some images."""

    def __init__(self) -> None:
        super().__init__()
        self.bins = nn.Parameter(torch.linspace(-0.2, 0.2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -(images.mean((1, 2, 3))[:, None] - self.bins).abs()


def expected() -> float:
    with torch.no_grad():
        predicted = Brightness()(torch.stack([TRANSFORM(image) for image, _ in IMAGES])).argmax(1)
    return 100 * (predicted == torch.from_numpy(LABELS)).float().mean().item()


def write_shards(folder: Path, shards: int = 3) -> None:
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        files = {}
        for number in range(shard, NUMBER, shards):
            Image.fromarray(PIXELS[number]).save(image := io.BytesIO(), "PNG")
            files |= {f"{number:04d}.png": image.getvalue(), f"{number:04d}.cls": str(LABELS[number]).encode()}
        write_tar(folder / f"val-{shard}.tar", files)


def open_shards(folder: Path, number: int = NUMBER):
    return open_dataset("wds/toy", folder, "val", split_name=f"val-{{0..2}}.tar|{number}", num_classes=3)


def test_top1_counts_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    accuracy = top1(model, evaluation_loader(IMAGES, TRANSFORM, batch_size=4), num_classes=3)
    assert not model.training
    with torch.no_grad():
        predicted = model(torch.stack([TRANSFORM(image) for image, _ in IMAGES])).argmax(1)
    assert accuracy == pytest.approx(100 * (predicted == torch.from_numpy(LABELS)).float().mean().item())


@pytest.mark.parametrize("source", ["arrays", "shards"])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (3, 2), (4, 1), (16, 0)])
def test_shares_of_all_ranks_are_the_data_set(source: str, ranks: int, workers: int, tmp_path: Path) -> None:
    write_shards(tmp_path)
    dataset = IMAGES if source == "arrays" else open_shards(tmp_path)
    shares = [
        list(evaluation_loader(dataset, TRANSFORM, batch_size=2, workers=workers, rank=rank, world_size=ranks))
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    found = [
        (image.mean().item(), label.item())
        for share in shares
        for images, labels in share
        for image, label in zip(images, labels, strict=True)
        if label != -100
    ]
    whole = sorted((TRANSFORM(image).mean().item(), int(label)) for image, label in IMAGES)
    assert np.array(sorted(found)) == pytest.approx(np.array(whole))


def evaluate(folder: Path) -> list[float]:
    """The accuracy on arrays and on shards, computed on this rank."""
    place = {"batch_size": 2, "rank": rank(), "world_size": world_size()}
    sources = (IMAGES, open_shards(folder))
    return [top1(Brightness(), evaluation_loader(source, TRANSFORM, **place), 3) for source in sources]


@pytest.mark.slow
def test_two_processes_have_the_accuracy_of_one(tmp_path: Path) -> None:
    write_shards(tmp_path)
    assert 0 < expected() < 100
    for accuracies in (evaluate(tmp_path), *in_ranks(2, tmp_path, evaluate, tmp_path)):
        assert accuracies == pytest.approx([expected()] * 2)


def test_a_stream_with_fewer_images_than_declared_raises(tmp_path: Path) -> None:
    write_shards(tmp_path)
    loader = evaluation_loader(open_shards(tmp_path, number=12), TRANSFORM, batch_size=4)
    with pytest.raises(LoaderError, match="wds/toy: 11 of 12 validation images were read"):
        top1(Brightness(), loader, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_raises(workers: int) -> None:
    loader = evaluation_loader([*IMAGES, (None, 0)], TRANSFORM, batch_size=4, workers=workers)
    with pytest.raises(LoaderError, match=r"^image number 11 cannot be read: AttributeError.*\Z"):  # one line
        top1(Brightness(), loader, 3)
