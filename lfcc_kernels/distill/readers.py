"""Data sets through timm's readers: tar files, torchvision, Hugging Face and TensorFlow datasets, WebDataset.

Those with random access become map-style sets of (PIL image, label). Those that are read from beginning to end become
a `Stream`.
"""

from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from PIL import Image
from timm.data import IterableImageDataset, create_dataset
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset

STREAMED = ("hfids", "tfds", "wds")
PREFIXES = ("torch", "hfds", *STREAMED)
_PACKAGES = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets", "wds": "webdataset"}


class ReaderImages(Dataset):
    """A reader of timm with random access.

    An image that cannot be read is an error here; timm's own data set gives the next image in its place.
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

    def rows(self) -> Iterable[tuple]:
        """What tells the images apart without decoding them: of each its name, its size in bytes and its label."""
        if isinstance(self.reader, ReaderImageInTar):
            files = (file for file, *_ in self.reader.samples)
            return ((file.name, file.size, int(label)) for file, label in zip(files, self.reader.targets, strict=True))
        return _arrow_rows(self.reader.dataset.with_format("arrow")[:], self.reader.image_key)


class Stream:
    """A data set without random access: its length, its `classes`, and `read` for timm's iterable over it."""

    def __init__(
        self, name: str, root: str, split: str, *, num_classes: int | None, keys: Mapping[str, str | None]
    ) -> None:
        self.name = name
        self._place, self._options = (name, root, split), dict(keys)
        if name.startswith("wds/") and keys["input_key"]:
            self._options["input_key"] = f"{keys['input_key']};jpg"  # as timm calls the image that it has decoded
        if name.startswith("hfids/"):
            split, _, number = split.partition("|")
            self._place, self._options["num_samples"] = (name, root, split), int(number) if number else None
        try:
            reader = self.read(training=True).reader
        except ValueError as error:
            if "num_samples" not in str(error):  # what timm misses
                raise
            message = f"{name} does not say how many images {split} has: give their number, as the split {split}|NUMBER"
            raise ValueError(message) from error
        self._length = reader.num_samples
        self.classes = class_names(name, reader.class_to_idx, num_classes)
        self.shards: int | None = None  # where a loader process needs one of its own
        if name.startswith("wds/"):
            self.shards = _count_shards(name, root, reader.split_info.filenames)

    def __len__(self) -> int:
        return self._length

    def read(
        self, *, training: bool = False, batch_size: int = 1, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> IterableImageDataset:
        """An iterable of (PIL image, label): the rank's part, divided over the loader's workers.

        For training it is shuffled and begins anew until each worker has given its part of the images, rounded up to
        whole batches. Otherwise each image comes once, in order.
        """
        dataset = _create(*self._place, is_training=training, batch_size=batch_size, seed=seed, **self._options)
        # timm takes these from torch.distributed, under which no rank could read everything.
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = rank, world_size
        return dataset


def open_timm(
    name: str, root: str, split: str, *, num_classes: int | None, keys: Mapping[str, str | None]
) -> Dataset | Stream:
    """A data set whose name begins with one of PREFIXES; `data.open_dataset` describes them."""
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
    except (KeyError, TypeError) as error:  # datasets makes up a column of None for the images
        raise ValueError(
            f"{name} has no images in a column {reader.image_key!r} beside labels in {reader.label_key!r}: name the "
            "columns with --input-key and --target-key"
        ) from error
    return ReaderImages(reader, class_names(name, reader.class_to_idx, num_classes))


def open_tar(path: Path, num_classes: int | None) -> ReaderImages:
    """Images in a tar file, or in tar files within it; an image's class is the folder or inner tar file it is in."""
    try:
        # An open tar file would be shared, with its position, by all loader processes.
        reader = create_dataset("", str(path), cache_tarfiles=False).reader
    except Exception as error:  # timm unpacks an empty list where there is no image
        raise ValueError(f"{path} is damaged, or has no images in it ({error})") from error
    return ReaderImages(reader, class_names(str(path), reader.class_name_to_idx, num_classes))


def class_names(name: str, known: Iterable[str], num_classes: int | None) -> list[str]:
    """The names `known` in the order of their labels, or numbers where there are none."""
    names = list(known)
    if names and num_classes not in (None, len(names)):
        raise ValueError(f"{name} has {len(names)} classes and not {num_classes}: leave out --num-classes")
    if not names and num_classes is None:
        raise ValueError(f"{name} has no names of classes: say how many classes there are with --num-classes")
    return names or [str(number) for number in range(num_classes)]


def _arrow_rows(table: Any, image_key: str) -> Iterator[tuple]:
    """Name and size of each image, with what is in the other columns. The table is mapped into memory, not read."""
    from pyarrow import compute

    images, others = table[image_key], table.drop_columns(image_key)
    paths = compute.struct_field(images, "path").to_pylist()
    sizes = compute.binary_length(compute.struct_field(images, "bytes")).to_pylist()
    for path, size, other in zip(paths, sizes, others.to_pylist(), strict=True):
        yield path and Path(path).name, Path(path).stat().st_size if size is None else size, other


def _open_torch(name: str, root: str, split: str, num_classes: int | None) -> Dataset:
    try:
        dataset = _create(name, root, split)
    except ValueError as error:
        if "download=True" not in str(error):
            raise
        code = f"from timm.data import create_dataset; create_dataset({name!r}, {root!r}, {split!r}, download=True)"
        raise FileNotFoundError(f'no {name} in {root}, or it is damaged; to fetch it: python -c "{code}"') from error
    # torchvision's ImageNet has a tuple of synonyms a class.
    known = [label if isinstance(label, str) else ", ".join(label) for label in getattr(dataset, "classes", ())]
    dataset.classes = class_names(name, known, num_classes)
    return dataset


def _count_shards(name: str, root: str, files: Iterable[str]) -> int:
    """How many there are. Raises FileNotFoundError for a local one that is missing: timm would pass over it."""
    files = list(files)
    missing = [] if urlparse(root).scheme else [file for file in files if not (Path(root) / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{name} lacks {len(missing)} of {len(files)} shards in {root}, first {missing[0]}")
    return len(files)


def _create(name: str, root: str, split: str, **options: Any) -> Dataset:
    try:
        return create_dataset(name, root, split, **options)
    except OSError:
        raise
    except Exception as error:  # asserts, KeyErrors and RuntimeErrors of timm, torchvision and datasets
        raise ValueError(f"{name} cannot be opened: {' '.join(str(error).split())}") from error
