"""A teacher's outputs for every image of a data set, kept in memory-mapped files that take its place in a run.

A cache is a folder. `cache.json` holds its `Manifest`: what it is of, and its layout. `part-00000.npy` and so on have
`images_per_part` images each, (images, views, width): view 0 is the image as the evaluation transform makes it, view 1
the same flipped left to right. A row is an image's logits and then its pyramids, stage by stage, so that it is one
contiguous read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .distiller import TeacherOutputs
from .features import Tap

MANIFEST = "cache.json"
_FORMAT = 1
_OPEN_PARTS = 128  # each costs a file descriptor, of which a process has about a thousand


class CacheError(ValueError):
    """A teacher cache that is incomplete, damaged or of something else."""


@dataclass(frozen=True)
class Manifest:
    """What a cache is of, as `cache_identity.identity_of` says it, and how it is laid out.

    `precision` is the dtype that the teacher ran in, `dtype` that of the rows.
    """

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
        """Of the logits and of each stage in a row."""
        return [self.num_classes, *(self.cells * tap.channels for tap in self.taps)]

    @property
    def parts(self) -> int:
        return -(-self.images // self.images_per_part)

    def of_part(self, part: int) -> range:
        """The images in a part."""
        return range(self.images)[part * self.images_per_part : (part + 1) * self.images_per_part]

    def path(self, folder: Path, part: int) -> Path:
        return folder / f"part-{part:05d}.npy"

    def header(self, part: int) -> bytes:
        """How the file of a part begins."""
        file, shape = io.BytesIO(), (len(self.of_part(part)), 1 + self.flips, sum(self.widths))
        descr = np.lib.format.dtype_to_descr(np.dtype(self.dtype))
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        return file.getvalue()

    def bytes_of_images(self, images: int) -> int:
        return images * (1 + self.flips) * sum(self.widths) * np.dtype(self.dtype).itemsize

    def missing_parts(self, folder: Path) -> list[int]:
        """The parts that are not there with their header and their length."""
        return [part for part in range(self.parts) if not self._has(folder, part)]

    def _has(self, folder: Path, part: int) -> bool:
        path, header = self.path(folder, part), self.header(part)
        if not path.is_file() or path.stat().st_size != len(header) + self.bytes_of_images(len(self.of_part(part))):
            return False
        with path.open("rb") as file:
            return file.read(len(header)) == header

    def to_json(self) -> dict[str, Any]:
        # Through JSON, as what is compared with it is read from there: tuples become lists.
        return json.loads(json.dumps({"format": _FORMAT, **asdict(self)}))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises FileNotFoundError where there is no cache, CacheError where its manifest cannot be read."""
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"no teacher cache in {folder}: make it by `lfcc cache {folder}` with the run's options"
            )
        try:
            fields = json.loads(path.read_text())
            version = fields.pop("format")
            taps = tuple(Tap(**{**tap, "grid": tuple(tap["grid"])}) for tap in fields.pop("taps"))
            if version != _FORMAT:
                raise CacheError(f"{folder} has cache format {version}, expected {_FORMAT}: make the cache again")
            return cls(**fields, taps=taps)
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CacheError(f"{path} is damaged ({error}): delete {folder} and make the cache again") from error


class TeacherCache:
    """The teacher's outputs by image, read from a complete cache. May be pickled, and used in forked processes.

    `taps` and `channels` are those of the teacher's extractor.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.taps, self.num_classes, self.flips = manifest.taps, manifest.num_classes, manifest.flips
        self.channels = [tap.channels for tap in manifest.taps]
        self._part = lru_cache(_OPEN_PARTS)(self._open_part)

    @classmethod
    def open(cls, folder: str | Path) -> TeacherCache:
        """Raises FileNotFoundError where there is no cache, CacheError for one that is damaged or not complete."""
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if missing := manifest.missing_parts(folder):
            raise CacheError(
                f"{len(missing)} of {manifest.parts} parts of the cache {folder} are missing or damaged, first "
                f"{manifest.path(folder, missing[0]).name}: run its `lfcc cache` again, which makes these only"
            )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.images

    def __reduce__(self) -> tuple:
        return TeacherCache, (self.folder, self.manifest)

    def require(self, identity: Mapping[str, Any]) -> None:
        """Raises CacheError where the cache is not of `identity`. It may hold more: flips, or pyramids."""
        kept = {section: self.manifest.identity.get(section) for section in identity}
        if found := difference(identity, kept):
            raise CacheError(
                f"the cache {self.folder} is not for this run: {found}; change the run's options, or make another "
                "cache by `lfcc cache` with them"
            )

    def row(self, index: int, flipped: bool) -> Tensor:
        """(width,) in the cache's dtype: what the teacher makes of the image with this index."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} is not in {self.folder}, which has {len(self)}")
        if flipped and not self.flips:
            raise CacheError(f"{self.folder} has no flipped images: make a cache with --hflip, or run with --hflip 0")
        part, place = divmod(index, self.manifest.images_per_part)
        return torch.from_numpy(np.array(self._part(part)[place, int(flipped)]))

    def outputs(self, rows: Tensor) -> TeacherOutputs:
        """Rows (B, width) as float32 logits (B, classes) and pyramids, (B, cells, C_t) a stage."""
        logits, *stages = (values.float().contiguous() for values in rows.split(self.manifest.widths, 1))
        return TeacherOutputs(logits, [stage.unflatten(1, (self.manifest.cells, -1)) for stage in stages] or None)

    def _open_part(self, part: int) -> np.ndarray:
        return np.load(self.manifest.path(self.folder, part), mmap_mode="r")


def difference(asked: Any, kept: Any, name: str = "") -> str | None:
    """The first leaf of two nested dicts that differs, in words; None if none does."""
    if isinstance(asked, Mapping) and isinstance(kept, Mapping):
        names = [*asked, *(key for key in kept if key not in asked)]
        found = (difference(asked.get(key), kept.get(key), f"{name} {key}") for key in names)
        return next(filter(None, found), None)
    asked = json.loads(json.dumps(asked))
    return None if asked == kept else f"{name.strip().replace('_', ' ')} is {asked}, and {kept} in the cache"
