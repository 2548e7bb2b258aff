"""Opens data sets by name.

A data set maps an index to (PIL image, label), or is a `Stream` if it has no random access. Its `classes` are the names
of the classes in the order of the labels.
"""

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import FashionMNIST, ImageFolder

from . import cifar10
from .readers import PREFIXES, ImageDataset, ReaderImages, Stream, class_names, open_tar, open_timm

FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
FASHION_MNIST_SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist
_SPLITS = {"train": ("train",), "val": ("validation", "val")}


class ImageArrays(Dataset):
    """Images in memory, (N, H, W, 3) or gray (N, H, W) uint8, with labels (N,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
        self.images, self.labels, self.classes = images, labels, list(classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def open_dataset(
    name: str,
    root: str | Path,
    split: str,
    *,
    split_name: str | None = None,
    num_classes: int | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
) -> ImageDataset | Stream:
    """Open the training or the validation split of a data set.

    Args:
        name: one of
            "folder": root/train/CLASS/*.jpg and root/val/CLASS/*.jpg, the layout of ImageNet.
            "tar": the same folders in root/train.tar and root/val.tar, or one inner tar file per class.
            "cifar10": 50,000 and 10,000 images; see `read_cifar10` for the accepted files.
            "fashion-mnist": 60,000 and 10,000 images in four idx files, optionally compressed (.gz).
            "digits": 1,348 and 449 images of 8 x 8 pixels, part of scikit-learn; `root` is ignored.
            "torch/NAME": a torchvision data set such as torch/cifar100.
            "hfds/NAME": a data set of the Hugging Face hub, or in a folder NAME; `root` is the download folder.
            "hfids/NAME", "tfds/NAME", "wds/NAME": a `Stream` from the Hugging Face hub, TensorFlow datasets, or
            WebDataset shards in `root` (with any NAME).
        root: the data folder.
        split: "train" or "val"; "val" is the test set of a data set with two splits.
        split_name: the data set's own name of the split; by default "train" and "validation", or "val" in folders and
            tar files. For WebDataset shards without an _info.json, file names and the number of images, such as
            "train-{000..099}.tar|128000".
        num_classes: number of classes, required if the data set has no class names.
        input_key, target_key: columns of image and label in a Hugging Face or TensorFlow data set. In WebDataset, file
            extensions of the images ("jpg;png;webp") and field of the JSON part (by default the .cls part).

    Raises:
        FileNotFoundError: the data does not exist.
        ModuleNotFoundError: the package that reads it is not installed.
        ValueError: the data is damaged, or name, split or number of classes do not match it.
    """
    if split not in ("train", "val"):
        raise ValueError(f'split is {split!r}, expected "train" or "val"')
    split_name = split_name or _SPLITS[split][0]
    if "/" in name and name.split("/")[0] in PREFIXES:
        keys = {"input_key": input_key, "target_key": target_key}
        return open_timm(name, str(root), split_name, num_classes=num_classes, keys=keys)
    if name == "tar":
        return open_tar(_find_split(Path(root), split_name, "{}.tar with CLASS/IMAGE in it"), num_classes)
    if name == "folder":
        dataset = _open_folder(_find_split(Path(root), split_name, "{}/CLASS/IMAGE"))
    elif name not in _ARRAYS:
        known = ", ".join(["folder", "tar", *_ARRAYS, *(f"{prefix}/NAME" for prefix in PREFIXES)])
        raise ValueError(f"unknown data set {name!r}, expected one of {known}")
    elif split_name not in _SPLITS[split]:
        raise ValueError(f"{name} has no split {split_name!r}, only train and validation")
    else:
        dataset = _ARRAYS[name](Path(root), split)
    class_names(name, dataset.classes, num_classes)
    return dataset


def fingerprint(dataset: ImageDataset | Stream) -> str:
    """A hash of images and labels in order: of arrays in memory, otherwise of each file's name, size and label.

    Raises ValueError for a data set without random access.
    """
    digest = hashlib.sha256()
    for row in _identifying_rows(dataset):
        digest.update(f"{row}\n".encode())
    return digest.hexdigest()


def _identifying_rows(dataset: ImageDataset | Stream) -> Iterable[tuple]:
    if isinstance(dataset, ImageFolder):
        paths = ((Path(path), label) for path, label in dataset.samples)
        return ((path.relative_to(dataset.root).as_posix(), path.stat().st_size, label) for path, label in paths)
    if isinstance(dataset, ReaderImages):
        return dataset.identifying_rows()
    images, labels = (getattr(dataset, name, None) for name in ("data", "targets"))  # torchvision's names
    if isinstance(dataset, ImageArrays):
        images, labels = dataset.images, dataset.labels
    if images is None or labels is None:
        raise ValueError(
            f"cannot fingerprint a {type(dataset).__name__} for a teacher cache: use a data set with random access, "
            "such as folder, tar, hfds/NAME or torch/cifar100"
        )
    arrays = (np.ascontiguousarray(array) for array in (images, labels))
    return [(array.shape, array.dtype.str, hashlib.sha256(array.data).hexdigest()) for array in arrays]


def _find_split(root: Path, split_name: str, layout: str) -> Path:
    names = _SPLITS["val"] if split_name in _SPLITS["val"] else (split_name,)
    suffix = ".tar" if ".tar" in layout else ""
    for name in names:
        if (path := root / f"{name}{suffix}").exists():
            return path
    raise FileNotFoundError(f"{path} does not exist: expected {' or '.join(map(layout.format, names))} in {root}")


def _open_folder(folder: Path) -> ImageDataset:
    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:  # also raised for a class without images
        raise FileNotFoundError(f"{folder} is not an image folder: {str(error).splitlines()[0]}") from error


def _open_cifar10(root: Path, split: str) -> ImageArrays:
    return ImageArrays(*cifar10.read_cifar10(root, "train" if split == "train" else "test"), cifar10.CLASSES)


def _open_fashion_mnist(root: Path, split: str) -> ImageArrays:
    prefix = "train" if split == "train" else "t10k"
    folders = (root, root / "FashionMNIST" / "raw", FASHION_MNIST_SYSTEM_FOLDER)
    images, labels = (_read_idx(folders, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    return ImageArrays(images, labels, FashionMNIST.classes)


def _read_idx(folders: Sequence[Path], name: str) -> np.ndarray:
    """An idx file: 0, 0, 8 for uint8, the number of axes, each axis as a big-endian int32, the data."""
    paths = [folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".gz")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"no {name} or {name}.gz in {' or '.join(map(str, folders))}: put the four files of Fashion-MNIST there, "
            "or install Debian's package dataset-fashion-mnist"
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): download it again") from error
    if (md5 := hashlib.md5(raw).hexdigest()) != FASHION_MNIST_MD5[name]:
        raise ValueError(
            f"{path} is damaged or not the original Fashion-MNIST (MD5 of the unpacked file is {md5}, expected "
            f"{FASHION_MNIST_MD5[name]}): download it again"
        )
    axes = raw[3]
    shape = np.frombuffer(raw, ">i4", count=axes, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _open_digits(root: Path, split: str) -> ImageArrays:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise FileNotFoundError(
            "the digits are part of scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    digits = load_digits()
    of_split = (np.arange(len(digits.target)) % 4 == 3) == (split == "val")
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    return ImageArrays(images[of_split], digits.target[of_split], [str(name) for name in digits.target_names])


_ARRAYS: dict[str, Callable[[Path, str], ImageArrays]] = {
    "cifar10": _open_cifar10,
    "fashion-mnist": _open_fashion_mnist,
    "digits": _open_digits,
}
