"""Training batches of streams: WebDataset shards and Hugging Face streams."""

import io
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from toy_runs import write_tar

from lfcc_kernels.distill.data import fingerprint, open_dataset
from lfcc_kernels.distill.data.readers import LoaderError, Stream
from lfcc_kernels.distill.data.streams import StreamedBatches

NUMBER, SHARDS = 48, 4
AUGMENTED = create_transform(8, is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.5)
PLAIN = create_transform(8, is_training=True, no_aug=True, mean=(0, 0, 0), std=(1, 1, 1))


def png(value: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    noise[..., 0] = value
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, broken: tuple[int, ...] = ()) -> None:
    for shard in range(SHARDS):
        files = {}
        for number in range(shard, NUMBER, SHARDS):
            files[f"{number:04d}.png"] = b"nothing" if shard in broken else png(number)
            files[f"{number:04d}.cls"] = str(number % 3).encode()
        write_tar(folder / f"train-{shard}.tar", files)


def open_shards(folder: Path, number: str = f"|{NUMBER}") -> Stream:
    return open_dataset("wds/toy", folder, "train", split_name=f"train-{{0..3}}.tar{number}", num_classes=3)


def open_hugging_face(folder: Path, number: str = f"|{NUMBER}") -> Stream:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    (folder / "data").mkdir(exist_ok=True)
    for shard in range(SHARDS):
        numbers = range(shard, NUMBER, SHARDS)
        columns = {
            "image": [{"bytes": png(number), "path": f"{number}.png"} for number in numbers],
            "label": [number % 3 for number in numbers],
        }
        path = folder / "data" / f"train-{shard:05d}-of-{SHARDS:05d}.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    name = f"hfids/{folder}/data"
    return open_dataset(name, folder / "cache", "train", split_name=f"train{number}", num_classes=3)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the five seconds that `datasets` waits for its threads after each pass."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(params=["wds", "hfids"])
def stream(request: pytest.FixtureRequest, tmp_path: Path) -> Stream:
    if request.param == "hfids":
        return open_hugging_face(tmp_path)
    write_shards(tmp_path)
    return open_shards(tmp_path)


def drawn(source: StreamedBatches, epoch: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels, *_ = zip(*source.epoch(epoch, first), strict=True)
    return torch.stack(images), torch.stack(labels)


def numbers(images: torch.Tensor) -> list[int]:
    """The numbers of the images under PLAIN, which are their red values."""
    return (images[..., 0, 0, 0] * 255).round().int().flatten().tolist()


def test_length_and_classes_of_a_stream(stream: Stream) -> None:
    assert len(stream) == NUMBER and len(stream.classes) == 3
    with pytest.raises(ValueError, match="cannot fingerprint a Stream"):
        fingerprint(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_each_image_with_its_label(stream: Stream, workers: int) -> None:
    source = StreamedBatches(stream, PLAIN, batch_size=4, seed=0, workers=workers)
    images, labels = drawn(source, epoch=0)
    assert images.shape == (12, 4, 3, 8, 8) and len(source) == 12
    assert sorted(numbers(images)) == list(range(NUMBER)) != numbers(images)
    assert [number % 3 for number in numbers(images)] == labels.flatten().tolist()
    assert numbers(drawn(source, epoch=1)[0]) != numbers(images)


@pytest.mark.parametrize("input_key", [None, "png", "jpg;png"])
def test_images_of_shards_are_selected_by_extension(tmp_path: Path, input_key: str | None) -> None:
    write_shards(tmp_path)
    options = {"split_name": "train-0.tar|12", "num_classes": 3, "input_key": input_key}
    images = [image for image, _ in open_dataset("wds/toy", tmp_path, "train", **options).read()]
    assert sorted(image.getpixel((0, 0))[0] for image in images) == list(range(0, NUMBER, SHARDS))


def test_images_are_shuffled_within_a_shard_in_each_epoch(tmp_path: Path) -> None:
    write_shards(tmp_path)
    stream = open_dataset("wds/toy", tmp_path, "train", split_name="train-0.tar|12", num_classes=3)
    orders = {
        tuple(numbers(drawn(StreamedBatches(stream, PLAIN, batch_size=4, seed=seed), epoch=epoch)[0]))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    }
    assert len(orders) == 3 and {tuple(sorted(order)) for order in orders} == {tuple(range(0, NUMBER, SHARDS))}


@pytest.mark.parametrize("workers", [1, 2])
def test_ranks_share_an_epoch(stream: Stream, workers: int) -> None:
    ranks = [
        StreamedBatches(stream, PLAIN, batch_size=4, seed=0, workers=workers, rank=rank, world_size=2)
        for rank in range(2)
    ]
    seen = [numbers(drawn(source, epoch=3)[0]) for source in ranks]
    assert [len(source) for source in ranks] == [6, 6] and [len(share) for share in seen] == [24, 24]
    assert sorted(seen[0] + seen[1]) == list(range(NUMBER))


def test_ranks_with_uneven_shards_have_equally_many_batches(tmp_path: Path) -> None:
    write_shards(tmp_path)
    stream = open_shards(tmp_path)
    sources = [StreamedBatches(stream, PLAIN, batch_size=3, seed=0, rank=rank, world_size=3) for rank in range(3)]
    assert [len(list(source.epoch(0))) for source in sources] == [len(source) for source in sources] == [5] * 3


@pytest.mark.parametrize(("workers", "mix"), [(1, None), (2, Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=3))])
def test_an_epoch_can_start_in_the_middle(stream: Stream, workers: int, mix: Mixup | None) -> None:
    def source(seed: int = 0) -> StreamedBatches:
        return StreamedBatches(stream, AUGMENTED, batch_size=4, seed=seed, workers=workers, mix=mix)

    unbroken = source()
    drawn(unbroken, epoch=0)
    images, labels = drawn(unbroken, epoch=1)
    for first in (1, 7):
        random.seed(first), np.random.seed(first), torch.manual_seed(first)  # the global generators must not matter
        rest, rest_labels = drawn(source(), epoch=1, first=first)
        assert torch.equal(images[first:], rest) and torch.equal(labels[first:], rest_labels)
    assert not torch.equal(images, drawn(source(), epoch=2)[0])
    assert not torch.equal(images, drawn(source(seed=1), epoch=1)[0])


def test_the_global_generators_are_not_advanced(stream: Stream) -> None:
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    drawn(StreamedBatches(stream, AUGMENTED, batch_size=4, seed=0, mix=Mixup(num_classes=3)), epoch=0)
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


def test_an_id_belongs_to_one_pair_of_an_epoch(stream: Stream) -> None:
    mix = Mixup(num_classes=3)
    ids = [
        batch.ids.tolist()
        for rank in range(2)
        for batch in StreamedBatches(stream, PLAIN, batch_size=4, seed=0, rank=rank, world_size=2, mix=mix).epoch(0)
    ]
    assert all(a == d and b == c and a != b for a, b, c, d in ids)
    assert len({value for batch in ids for value in batch}) == NUMBER // 2


def test_fewer_shards_than_workers_raise(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with pytest.raises(ValueError, match="wds/toy has 4 shards for 3 ranks with 2 workers each: lower --workers"):
        StreamedBatches(open_shards(tmp_path), PLAIN, batch_size=4, seed=0, workers=2, rank=2, world_size=3)
    stream = open_hugging_face(tmp_path)
    source = StreamedBatches(stream, PLAIN, batch_size=4, seed=0, workers=2, rank=1, world_size=4)
    with pytest.raises(LoaderError, match=r"1 shard\(s\) for this process but the loader has 2 workers") as caught:
        list(source.epoch(0))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_fewer_hugging_face_shards_than_ranks_are_shared(tmp_path: Path) -> None:
    stream = open_hugging_face(tmp_path)
    ranks = [StreamedBatches(stream, PLAIN, batch_size=2, seed=0, rank=rank, world_size=8) for rank in range(8)]
    seen = [numbers(drawn(source, epoch=0)[0]) for source in ranks]
    assert sorted(number for share in seen for number in share) == list(range(NUMBER))


def test_shards_without_images_raise(tmp_path: Path) -> None:
    write_shards(tmp_path, broken=(0, 1, 2, 3))
    source = StreamedBatches(open_shards(tmp_path), PLAIN, batch_size=4, seed=0)
    with pytest.raises(LoaderError, match="wds/toy ended after 0 of 12 batches because a worker found no more images"):
        list(source.epoch(0))


def test_missing_shards_numbers_and_classes_raise(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"wds/toy: 4 of 4 shards are missing in .*: train-0\.tar"):
        open_shards(tmp_path)
    write_shards(tmp_path)
    (tmp_path / "train-2.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"wds/toy: 1 of 4 shards are missing in .*: train-2\.tar"):
        open_shards(tmp_path)
    with pytest.raises(ValueError, match=r"does not contain the number of images .*train-\{0\.\.3\}\.tar\|NUMBER"):
        open_shards(tmp_path, number="")
    with pytest.raises(ValueError, match=r"number of images in the split train: name the split train\|NUMBER"):
        open_hugging_face(tmp_path, number="")
    with pytest.raises(ValueError, match=r"wds/toy has no class names: .* --num-classes"):
        open_dataset("wds/toy", tmp_path, "train", split_name="train-0.tar|12")
    with pytest.raises(ValueError, match="wds/toy cannot be opened: split train not found in info"):
        open_dataset("wds/toy", tmp_path, "train", num_classes=3)
