"""The teacher cache: a teacher's outputs for every image of a data set, in memory-mapped files.

A cache is a folder. `cache.json` contains its `Manifest`: its identity and its layout. The files `part-00000.npy`, ...
contain `images_per_part` images each, (images, views, width): view 0 is the image under the evaluation transform, view
1 its horizontal flip. A row is the image's logits followed by its pyramids stage by stage: one contiguous read.

`lfcc cache` writes it with `CacheWriter`, `lfcc distill --teacher-cache` reads it with `TeacherCache`.
"""

from __future__ import annotations

import errno
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lfcc_kernels.files import remove_stale, replace_file, write_file

from .data.readers import loader_errors
from .distiller import TeacherOutputs
from .distributed import barrier, rank, world_size
from .features import Tap

MANIFEST = "cache.json"
_FORMAT = 1
_OPEN_PARTS = 128  # each needs a file descriptor, of which a process has about a thousand


class CacheError(ValueError):
    """A teacher cache is incomplete, damaged, or belongs to another run."""


@dataclass(frozen=True)
class Manifest:
    """Identity and layout of a cache. `precision` is the dtype in which the teacher ran, `dtype` that of the rows."""

    identity: Mapping[str, Any]
    taps: tuple[Tap, ...]
    num_classes: int
    cells: int
    images: int
    precision: str
    dtype: str = "float16"
    images_per_part: int = 1024

    @property
    def flips(self) -> bool:
        return bool(self.identity.get("flips"))

    @property
    def widths(self) -> list[int]:
        """Widths of the logits and of each stage in a row."""
        return [self.num_classes, *(self.cells * tap.channels for tap in self.taps)]

    @property
    def parts(self) -> int:
        return -(-self.images // self.images_per_part)

    def of_part(self, part: int) -> range:
        """The images of a part."""
        return range(self.images)[part * self.images_per_part : (part + 1) * self.images_per_part]

    def path(self, folder: Path, part: int) -> Path:
        return folder / f"part-{part:05d}.npy"

    def header(self, part: int) -> bytes:
        """The npy header of a part."""
        file, shape = io.BytesIO(), (len(self.of_part(part)), 1 + self.flips, sum(self.widths))
        descr = np.lib.format.dtype_to_descr(np.dtype(self.dtype))
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        return file.getvalue()

    def num_bytes(self, images: int) -> int:
        """Size of the rows of this many images."""
        return images * (1 + self.flips) * sum(self.widths) * np.dtype(self.dtype).itemsize

    def missing_parts(self, folder: Path) -> list[int]:
        """The parts that do not exist, or have another header or length."""
        return [part for part in range(self.parts) if not self._is_complete(folder, part)]

    def _is_complete(self, folder: Path, part: int) -> bool:
        path, header = self.path(folder, part), self.header(part)
        if not path.is_file() or path.stat().st_size != len(header) + self.num_bytes(len(self.of_part(part))):
            return False
        with path.open("rb") as file:
            return file.read(len(header)) == header

    def to_json(self) -> dict[str, Any]:
        # Through JSON, since it is compared with parsed JSON, in which tuples are lists.
        return json.loads(json.dumps({"format": _FORMAT, **asdict(self)}))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises FileNotFoundError if there is no cache, CacheError if its manifest is damaged."""
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"no teacher cache in {folder}: create it with `lfcc cache {folder} [option ...]`")
        try:
            fields = json.loads(path.read_text())
            version = fields.pop("format")
            taps = tuple(Tap(**{**tap, "grid": tuple(tap["grid"])}) for tap in fields.pop("taps"))
            if version != _FORMAT:
                raise CacheError(f"the cache {folder} has format {version}, expected {_FORMAT}: create it again")
            return cls(**fields, taps=taps)
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CacheError(f"{path} is damaged ({error}): delete {folder} and create the cache again") from error


class TeacherCache:
    """Reads the teacher's outputs by image from a complete cache. Can be pickled and used in forked processes.

    `taps` and `channels` are those of the teacher's extractor.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.taps, self.num_classes, self.flips = manifest.taps, manifest.num_classes, manifest.flips
        self.channels = [tap.channels for tap in manifest.taps]
        self._part = lru_cache(_OPEN_PARTS)(self._open_part)

    @classmethod
    def open(cls, folder: str | Path) -> TeacherCache:
        """Raises FileNotFoundError if there is no cache, CacheError if it is damaged or incomplete."""
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if missing := manifest.missing_parts(folder):
            raise CacheError(
                f"{len(missing)} of {manifest.parts} parts of the cache {folder} are missing or damaged, first "
                f"{manifest.path(folder, missing[0]).name}: run `lfcc cache` again to create them"
            )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.images

    def __reduce__(self) -> tuple:
        return TeacherCache, (self.folder, self.manifest)

    def require(self, identity: Mapping[str, Any]) -> None:
        """Raises CacheError if the cache has another identity. It may contain more: flips or pyramids."""
        cached = {section: self.manifest.identity.get(section) for section in identity}
        if found := difference(identity, cached):
            raise CacheError(
                f"the cache {self.folder} does not match this run: {found}. Change the options of the run, or create "
                "another cache with them"
            )

    def row(self, index: int, flipped: bool) -> Tensor:
        """The teacher's outputs (width,) for one image, in the dtype of the cache."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} is out of range: the cache {self.folder} has {len(self)} images")
        if flipped and not self.flips:
            raise CacheError(f"{self.folder} has no flipped images: create it with --hflip, or run with --hflip 0")
        part, offset = divmod(index, self.manifest.images_per_part)
        return torch.from_numpy(np.array(self._part(part)[offset, int(flipped)]))

    def outputs(self, rows: Tensor) -> TeacherOutputs:
        """Splits rows (B, width) into float32 logits (B, classes) and pyramids (B, cells, C_t), one per stage."""
        logits, *stages = (values.float().contiguous() for values in rows.split(self.manifest.widths, 1))
        return TeacherOutputs(logits, [stage.unflatten(1, (self.manifest.cells, -1)) for stage in stages] or None)

    def _open_part(self, part: int) -> np.ndarray:
        return np.load(self.manifest.path(self.folder, part), mmap_mode="r")


def prepare(folder: Path, manifest: Manifest) -> list[int]:
    """Create the folder of a cache, or open it if it has the same manifest. Returns the missing parts.

    Raises CacheError if the folder has another cache, FileExistsError if it has other files, OSError if the disk is too
    small for the missing parts.
    """
    if (folder / MANIFEST).exists():
        if found := difference(manifest.to_json(), Manifest.read(folder).to_json()):
            raise CacheError(f"{folder} contains another cache: {found}. Choose another folder, or delete this one")
        remove_stale(folder)
    elif folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty and not a teacher cache: choose another folder")
    missing = manifest.missing_parts(folder)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    needed = manifest.num_bytes(sum(len(manifest.of_part(part)) for part in missing))
    if (free := shutil.disk_usage(existing).free) < needed:
        raise OSError(
            errno.ENOSPC,
            f"{folder} needs {format_bytes(needed)} but its disk has {format_bytes(free)} free: use another disk, "
            "fewer --teacher-taps or smaller --lfcc-scales",
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / MANIFEST, f"{json.dumps(manifest.to_json(), indent=2)}\n")
    return missing


class CacheWriter:
    """Writes this rank's missing parts of a cache after `prepare`: rank r of W writes the parts r, r + W, ...

    `images` is a data set of (image tensor, label); `teacher` maps images (B, 3, H, W) to their outputs. `views` and
    `seconds` count the teacher's images on this rank and its time.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, images: Dataset, teacher: Callable[[Tensor], TeacherOutputs]
    ) -> None:
        self.folder, self.manifest, self._images, self._teacher = folder, manifest, images, teacher
        self.parts = [part for part in manifest.missing_parts(folder) if part % world_size() == rank()]
        self.views, self.seconds = 0, 0.0

    def write(self, *, batch_size: int, workers: int, device: torch.device, progress: Callable[[int], object]) -> None:
        """Write the parts; `progress` is called with the size of each finished batch.

        Raises CacheError if a value overflows the dtype of the cache, LoaderError if an image cannot be read, OSError
        if the disk is full. Finished parts remain.
        """
        batches = [
            images[first : first + batch_size]
            for images in map(self.manifest.of_part, self.parts)
            for first in range(0, len(images), batch_size)
        ]
        loader = DataLoader(
            self._images,
            batch_sampler=batches,  # type: ignore[arg-type]  # torch asks for lists, but takes any sequences
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
        )
        try:
            with loader_errors():
                tensors = (images.to(device, non_blocking=True) for images, _ in loader)
                for first in range(0, self.manifest.parts, world_size()):
                    if (part := first + rank()) in self.parts:
                        self._write_part(part, tensors, progress)
                    barrier()  # otherwise a fast rank could run into the time-out of the process group
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            message = f"the disk of {self.folder} is full; finished parts are complete. Free space, then run it again"
            raise OSError(error.errno, message) from error

    def _write_part(self, part: int, batches: Iterator[Tensor], progress: Callable[[int], object]) -> None:
        left = len(self.manifest.of_part(part))
        with replace_file(self.manifest.path(self.folder, part)) as file:
            file.write(self.manifest.header(part))
            while left:
                images = next(batches)
                file.write(self._rows(images).data)
                left -= len(images)
                progress(len(images))

    def _rows(self, images: Tensor) -> np.ndarray:
        """(B, views, width) in the dtype of the cache."""
        started = time.perf_counter()
        views = [images, images.flip(-1)] if self.manifest.flips else [images]
        exact = torch.stack([_flatten(self._teacher(view)) for view in views], 1)
        rounded = exact.to(getattr(torch, self.manifest.dtype))
        if not rounded.isfinite().all():
            problem, option = f"are not finite in {self.manifest.precision}", "check its weights, or use --no-amp"
            if exact.isfinite().all():
                problem = f"reach {exact.abs().max():.4g}, which overflows {self.manifest.dtype}"
                option = "use --cache-dtype float32"
            raise CacheError(f"the teacher's outputs {problem}: {option}, with another folder")
        rows = rounded.cpu().numpy()
        self.seconds += time.perf_counter() - started
        self.views += rows.shape[0] * rows.shape[1]
        return rows


def _flatten(outputs: TeacherOutputs) -> Tensor:
    """(B, width) float32, the inverse of `TeacherCache.outputs`."""
    return torch.cat([values.float().flatten(1) for values in (outputs.logits, *(outputs.pyramids or []))], 1)


def difference(requested: Any, cached: Any, name: str = "") -> str | None:
    """Describes the first leaf that differs between two nested dicts; None if they are equal."""
    if isinstance(requested, Mapping) and isinstance(cached, Mapping):
        names = [*requested, *(key for key in cached if key not in requested)]
        found = (difference(requested.get(key), cached.get(key), f"{name} {key}") for key in names)
        return next(filter(None, found), None)
    requested = json.loads(json.dumps(requested))
    if requested == cached:
        return None
    return f"{name.strip().replace('_', ' ')} is {requested} in this run but {cached} in the cache"


def format_bytes(size: float) -> str:
    """A size with its unit, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
