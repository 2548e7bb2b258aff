"""Data sets read by timm from small files: tar, torchvision, Hugging Face."""

import hashlib
import io
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR100
from toy_runs import write_tar

from lfcc_kernels.distill.data import fingerprint, open_dataset, readers


def png(value: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def contents(dataset) -> list[tuple[int, int]]:
    """The red of each image, with its label."""
    return [(image.getpixel((0, 0))[0], label) for image, label in (dataset[i] for i in range(len(dataset)))]


@pytest.mark.parametrize("name", ["val", "validation"])
def test_tar_files(name: str, tmp_path: Path) -> None:
    write_tar(tmp_path / f"{name}.tar", {"dog/1.png": png(10), "cat/2.png": png(20), "dog/0.png": png(30)})
    dataset = open_dataset("tar", tmp_path, "val")
    assert dataset.classes == ["cat", "dog"]
    assert contents(dataset) == [(20, 0), (30, 1), (10, 1)]
    assert dataset.filename(1) == "dog/0.png"
    # Loader processes get a pickled copy.
    assert contents(pickle.loads(pickle.dumps(dataset))) == contents(dataset)


def test_a_tar_file_of_tar_files(tmp_path: Path) -> None:
    parts = {
        f"{name}.tar": write_tar(tmp_path / "part.tar", {f"{value}.png": png(value)})
        for name, value in (("n02", 7), ("n01", 5))
    }
    write_tar(tmp_path / "train.tar", parts)
    dataset = open_dataset("tar", tmp_path, "train")
    assert dataset.classes == ["n01", "n02"] and contents(dataset) == [(5, 0), (7, 1)]


def test_invalid_tar_files_raise(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected train\.tar with CLASS/IMAGE in it in "):
        open_dataset("tar", tmp_path, "train")
    write_tar(tmp_path / "train.tar", {"readme.txt": b"nothing"})
    (tmp_path / "val.tar").write_bytes(b"nothing" * 100)
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=rf"{split}\.tar is damaged or contains no images") as caught:
            open_dataset("tar", tmp_path, split)
        assert "\n" not in str(caught.value)


def test_fingerprint_of_a_tar_file(tmp_path: Path) -> None:
    files, seen = {"cat/0.png": png(1), "dog/0.png": png(2)}, set()
    changes = [{}, {"dog/0.png": png(2, size=64)}, {"dog/1.png": png(3)}]
    for change in (*changes, {}):
        files |= change
        write_tar(tmp_path / "train.tar", files)
        seen.add(fingerprint(open_dataset("tar", tmp_path, "train")))
    assert len(seen) == len(changes)


@pytest.fixture
def cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[int]]:
    images, labels = np.random.default_rng(0).integers(256, size=(5, 32, 32, 3)).astype(np.uint8), [3, 1, 4, 1, 99]
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    train = pickle.dumps({"data": images.transpose(0, 3, 1, 2).reshape(5, -1), "fine_labels": labels})
    meta = pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]})
    for name, content in (("train", train), ("meta", meta)):
        (folder / name).write_bytes(content)
    monkeypatch.setattr(CIFAR100, "train_list", [("train", hashlib.md5(train).hexdigest())])
    monkeypatch.setattr(CIFAR100, "test_list", [])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": hashlib.md5(meta).hexdigest()})
    return images, labels


def test_torchvision(cifar100: tuple[np.ndarray, list[int]], tmp_path: Path) -> None:
    dataset = open_dataset("torch/cifar100", tmp_path, "train")
    assert dataset.classes[:2] == ["class 0", "class 1"] and len(dataset.classes) == 100
    assert np.array_equal([np.asarray(image) for image, _ in dataset], cifar100[0])
    assert [label for _, label in dataset] == cifar100[1]
    before = fingerprint(dataset)
    dataset.targets[0] = 4
    assert fingerprint(dataset) != before


def test_missing_cifar100_raises(tmp_path: Path) -> None:
    fetch = rf"create_dataset\('torch/cifar100', '{tmp_path}', 'train', download=True\)"
    with pytest.raises(FileNotFoundError, match=f"torch/cifar100 is missing or damaged in {tmp_path}: .*{fetch}"):
        open_dataset("torch/cifar100", tmp_path, "train")
    with pytest.raises(ValueError, match="torch/cifar1000 cannot be opened: Unknown torchvision dataset"):
        open_dataset("torch/cifar1000", tmp_path, "train")


def write_hugging_face(folder: Path, values: list[int], *, classes: bool = True, size: int = 8) -> None:
    """A data set of PNGs in a parquet file; the label is the value modulo 3."""
    label = datasets.ClassLabel(names=["a", "b", "c"]) if classes else datasets.Value("int64")
    columns = {
        "picture": [{"bytes": png(value, size), "path": f"{value}.png"} for value in values],
        "kind": [value % 3 for value in values],
    }
    features = datasets.Features({"picture": datasets.Image(), "kind": label})
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train-00000-of-00001.parquet")


def open_hugging_face(folder: Path, **options):
    return open_dataset(
        f"hfds/{folder}", folder.parent / "cache", "train", input_key="picture", target_key="kind", **options
    )


def test_hugging_face(tmp_path: Path) -> None:
    write_hugging_face(tmp_path / "named", [4, 5, 6])
    dataset = open_hugging_face(tmp_path / "named")
    assert dataset.classes == ["a", "b", "c"] and contents(dataset) == [(4, 1), (5, 2), (6, 0)]
    write_hugging_face(tmp_path / "numbered", [4, 5, 6], classes=False)
    with pytest.raises(ValueError, match=r"numbered has no class names: .* --num-classes"):
        open_hugging_face(tmp_path / "numbered")
    assert open_hugging_face(tmp_path / "numbered", num_classes=3).classes == ["0", "1", "2"]


def test_fingerprint_of_hugging_face(tmp_path: Path) -> None:
    seen = []
    for name, values, size in (("x", [1, 2], 8), ("y", [1, 2], 8), ("z", [1, 2], 64), ("w", [1, 3], 8), ("v", [1], 8)):
        write_hugging_face(tmp_path / name, values, size=size)
        seen.append(fingerprint(open_hugging_face(tmp_path / name)))
    assert seen[0] == seen[1] and len(set(seen)) == 4


def test_invalid_hugging_face_data_sets_raise(tmp_path: Path) -> None:
    write_hugging_face(tmp_path / "data", [1, 2])
    with pytest.raises(ValueError, match='cannot be opened: Unknown split "validation"') as caught:
        open_dataset(f"hfds/{tmp_path}/data", tmp_path / "cache", "val", input_key="picture")
    assert "\n" not in str(caught.value)
    for key, column in ((None, "image"), ("picture", "picture")):
        with pytest.raises(ValueError, match=f"no images in column '{column}' with labels in column 'label': set"):
            open_dataset(f"hfds/{tmp_path}/data", tmp_path / "cache", "train", input_key=key)


@pytest.mark.parametrize(
    ("name", "package"),
    [("hfds/x", "datasets"), ("hfids/x", "datasets"), ("tfds/x", "tensorflow_datasets"), ("wds/x", "webdataset")],
)
def test_a_missing_package_raises(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ModuleNotFoundError, match=f"{name} needs the package {package}") as caught:
        open_dataset(name, "nowhere", "train")
    assert caught.value.name == package
