"""Readers of images, and their errors.

Wraps timm's readers: tar files, torchvision, Hugging Face and TensorFlow datasets, WebDataset. Those with random access
become map-style data sets of (PIL image, label), the others a `Stream`.
"""

import re
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from PIL import Image
from timm.data import IterableImageDataset, create_dataset
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

STREAMED = ("hfids", "tfds", "wds")
PREFIXES = ("torch", "hfds", *STREAMED)
_PACKAGES = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets", "wds": "webdataset"}
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid|shared memory|unable to \w+ (to )?file </torch_")


class LoaderError(OSError):
    """An image cannot be read, or a loader process died. The message is one line."""


class ImageDataset(Protocol):
    """A map-style data set; `classes` are the names of the classes in the order of the labels."""

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class ReaderImages(Dataset):
    """Images of a timm reader with random access.

    Unlike timm's own data set, it raises an error for an image that cannot be read, instead of using the next one.
    """

    def __init__(self, reader: Reader, classes: list[str]) -> None:
        self.reader, self.classes = reader, classes

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.reader[index]
        with file:
            image = Image.open(file)
            image.load()
        return image, int(label)

    def filename(self, index: int) -> str | None:
        return self.reader.filename(index)

    def identifying_rows(self) -> Iterable[tuple]:
        """Name, size in bytes and label of each image, without decoding it."""
        if isinstance(self.reader, ReaderImageInTar):
            files = (file for file, *_ in self.reader.samples)
            return ((file.name, file.size, int(label)) for file, label in zip(files, self.reader.targets, strict=True))
        return _arrow_rows(self.reader.dataset.with_format("arrow")[:], self.reader.image_key)


class Stream:
    """A data set without random access: its length, its `classes`, and `read`, which returns timm's iterable."""

    def __init__(
        self, name: str, root: str, split: str, *, num_classes: int | None, keys: Mapping[str, str | None]
    ) -> None:
        self.name = name
        self._source = name, root, split
        self._options: dict[str, Any] = dict(keys)
        if name.startswith("wds/") and keys["input_key"]:
            self._options["input_key"] = f"{keys['input_key']};jpg"  # timm stores the decoded image under "jpg"
        if name.startswith("hfids/"):
            split, _, number = split.partition("|")
            self._source, self._options["num_samples"] = (name, root, split), int(number) if number else None
        try:
            reader = self.read(training=True).reader
        except ValueError as error:
            if "num_samples" not in str(error):  # the argument that timm requires
                raise
            raise ValueError(
                f"{name} does not contain the number of images in the split {split}: name the split {split}|NUMBER"
            ) from error
        self._length = reader.num_samples
        self.classes = class_names(name, reader.class_to_idx, num_classes)
        self.shards: int | None = None  # number of shards, if every loader process needs one
        if name.startswith("wds/"):
            self.shards = _count_shards(name, root, reader.split_info.filenames)

    def __len__(self) -> int:
        return self._length

    def read(
        self, *, training: bool = False, batch_size: int = 1, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> IterableImageDataset:
        """An iterable of (PIL image, label): the share of a rank, split over the loader's workers.

        For training it is shuffled, and repeated until each worker has returned its share of the images, rounded up to
        whole batches. Otherwise each image is returned once, in order.
        """
        dataset = _create(*self._source, is_training=training, batch_size=batch_size, seed=seed, **self._options)
        # timm takes these from torch.distributed, so a rank could not read all images.
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = rank, world_size
        return dataset


def read_stream(name: str, images: IterableImageDataset) -> Iterator[tuple[Image.Image, int]]:
    """The items of `Stream.read`. Raises LoaderError if it cannot be read."""
    try:
        yield from images
    except Exception as error:  # of timm, datasets, tensorflow or the network
        raise LoaderError(f"{name} cannot be read: {_one_line(error)}") from error


def read_image(dataset: ImageDataset, index: int) -> tuple[Image.Image, int]:
    """An RGB image and its label. Raises LoaderError with the image's name if it cannot be read."""
    try:
        image, label = dataset[index]
        return image.convert("RGB"), label
    except Exception as error:  # depends on the image format
        name = None
        if isinstance(dataset, ImageFolder):
            name = dataset.samples[index][0]
        elif isinstance(dataset, ReaderImages):
            name = dataset.filename(index)
        raise LoaderError(f"image {name or f'number {index}'} cannot be read: {_one_line(error)}") from error


@contextmanager
def loader_errors() -> Iterator[None]:
    """Raise LoaderError for errors of the loader's processes.

    torch reports a dead process from a signal handler in the main thread, so the context must enclose the whole loop.
    """
    try:
        yield
    except LoaderError as error:
        # The message of another process is its traceback, which ends with the original message.
        message = str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.LoaderError: ")
        raise LoaderError(message) from error
    except RuntimeError as error:
        reason = next((line.strip() for line in str(error).splitlines() if _DEAD_WORKER.search(line)), None)
        if reason is None:
            raise
        raise LoaderError(
            f"a loader process died ({reason}): increase memory and shared memory (/dev/shm), or lower --workers"
        ) from error


def ignore_sigterm(worker: int) -> None:
    """`worker_init_fn`: a scheduler sends SIGTERM to all processes, but the main process still needs its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def open_timm(
    name: str, root: str, split: str, *, num_classes: int | None, keys: Mapping[str, str | None]
) -> ImageDataset | Stream:
    """Open a data set whose name starts with one of PREFIXES; see `open_dataset`."""
    prefix = name.split("/")[0]
    package = _PACKAGES.get(prefix)
    if package and find_spec(package) is None:
        raise ModuleNotFoundError(f"{name} needs the package {package}, which is not installed", name=package)
    if prefix == "torch":
        return _open_torch(name, root, split, num_classes)
    if prefix != "hfds":
        return Stream(name, root, split, num_classes=num_classes, keys=keys)
    reader = _create(name, root, split, **keys).reader
    try:
        reader[0][0].close()
    except (KeyError, TypeError) as error:  # datasets returns None for a missing column
        raise ValueError(
            f"{name} has no images in column {reader.image_key!r} with labels in column {reader.label_key!r}: set "
            "--input-key and --target-key"
        ) from error
    return ReaderImages(reader, class_names(name, reader.class_to_idx, num_classes))


def open_tar(path: Path, num_classes: int | None) -> ReaderImages:
    """Images in a tar file, or in tar files inside it; the class is the name of the folder or of the inner tar file."""
    try:
        # Loader processes would share an open tar file and its position.
        reader = create_dataset("", str(path), cache_tarfiles=False).reader
    except Exception as error:  # timm fails to unpack an empty list if there are no images
        raise ValueError(f"{path} is damaged or contains no images ({error})") from error
    return ReaderImages(reader, class_names(str(path), reader.class_name_to_idx, num_classes))


def class_names(name: str, known: Iterable[str], num_classes: int | None) -> list[str]:
    """The class names `known` in the order of the labels, or numbers if there are none."""
    names = list(known)
    if names and num_classes not in (None, len(names)):
        raise ValueError(f"--num-classes is {num_classes} but {name} has {len(names)} classes: omit --num-classes")
    if not names and num_classes is None:
        raise ValueError(f"{name} has no class names: set the number of classes with --num-classes")
    return names or [str(number) for number in range(num_classes)]


def _arrow_rows(table: Any, image_key: str) -> Iterator[tuple]:
    """Name and size of each image, and the values of the other columns. The memory-mapped table is not loaded."""
    from pyarrow import compute

    images, others = table[image_key], table.drop_columns(image_key)
    paths = compute.struct_field(images, "path").to_pylist()
    sizes = compute.binary_length(compute.struct_field(images, "bytes")).to_pylist()
    for path, size, other in zip(paths, sizes, others.to_pylist(), strict=True):
        yield path and Path(path).name, Path(path).stat().st_size if size is None else size, other


def _open_torch(name: str, root: str, split: str, num_classes: int | None) -> ImageDataset:
    try:
        dataset = _create(name, root, split)
    except ValueError as error:
        if "download=True" not in str(error):
            raise
        code = f"from timm.data import create_dataset; create_dataset({name!r}, {root!r}, {split!r}, download=True)"
        raise FileNotFoundError(
            f'{name} is missing or damaged in {root}: download it with python -c "{code}"'
        ) from error
    # torchvision's ImageNet has a tuple of synonyms per class.
    known = [label if isinstance(label, str) else ", ".join(label) for label in getattr(dataset, "classes", ())]
    dataset.classes = class_names(name, known, num_classes)
    return dataset


def _count_shards(name: str, root: str, files: Iterable[str]) -> int:
    """The number of shards. Raises FileNotFoundError for a missing local shard, which timm would skip."""
    files = list(files)
    missing = [] if urlparse(root).scheme else [file for file in files if not (Path(root) / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{name}: {len(missing)} of {len(files)} shards are missing in {root}: {missing[0]}, ..."
        )
    return len(files)


def _create(name: str, root: str, split: str, **options: Any) -> Any:
    try:
        return create_dataset(name, root, split, **options)
    except OSError:
        raise
    except Exception as error:  # assertions, KeyErrors and RuntimeErrors of timm, torchvision and datasets
        raise ValueError(f"{name} cannot be opened: {' '.join(str(error).split())}") from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
