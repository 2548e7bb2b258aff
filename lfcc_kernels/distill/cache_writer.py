"""Makes a teacher cache: rank r of W makes the parts r, r + W and so on that are missing."""

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lfcc_kernels.files import remove_stale, replace_file

from .cache import MANIFEST, CacheError, Manifest, difference
from .distiller import TeacherOutputs
from .ranks import barrier, rank, world_size
from .sampling import loader_errors


def prepare(folder: Path, manifest: Manifest) -> list[int]:
    """Make the folder of a cache, or find it, with the same manifest; returns the parts that are missing.

    Raises CacheError where there is another cache, FileExistsError where there is something else, OSError where the
    disk has no room for what is missing.
    """
    if (folder / MANIFEST).exists():
        if found := difference(manifest.to_json(), Manifest.read(folder).to_json()):
            raise CacheError(f"there is another cache in {folder}: {found}; name another folder, or delete this one")
        remove_stale(folder)
    elif folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty and no teacher cache: name another folder")
    missing = manifest.missing_parts(folder)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    needed = manifest.bytes_of_images(sum(len(manifest.of_part(part)) for part in missing))
    if (free := shutil.disk_usage(place).free) < needed:
        raise OSError(
            errno.ENOSPC,
            f"{folder} needs {in_units(needed)} more and its disk has {in_units(free)}: choose another disk, fewer "
            "--teacher-taps or smaller --lfcc-scales",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(folder / MANIFEST) as file:
        file.write(json.dumps(manifest.to_json(), indent=2).encode() + b"\n")
    return missing


class CacheWriter:
    """Writes this rank's missing parts of a cache that `prepare` has made.

    `images` is the dataset, of (image tensor, label); `teach` maps images (B, 3, H, W) to what is kept of them.
    `views` and `seconds` count what the teacher did here and how long it took.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, images: Dataset, teach: Callable[[Tensor], TeacherOutputs]
    ) -> None:
        self.folder, self.manifest, self._images, self._teach = folder, manifest, images, teach
        self.parts = [part for part in manifest.missing_parts(folder) if part % world_size() == rank()]
        self.views, self.seconds = 0, 0.0

    def write(self, *, batch_size: int, workers: int, device: torch.device, progress: Callable[[int], object]) -> None:
        """Make the parts; `progress` is called with the number of images in each batch that is done.

        Raises CacheError where the cache's dtype cannot hold a value, LoaderError where an image cannot be read,
        OSError where the disk is full. Finished parts stay.
        """
        batches = [
            images[first : first + batch_size]
            for images in map(self.manifest.of_part, self.parts)
            for first in range(0, len(images), batch_size)
        ]
        loader = DataLoader(
            self._images,
            batch_sampler=batches,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
        )
        with loader_errors(), _full_disk_in_words(self.folder):
            tensors = (images.to(device, non_blocking=True) for images, _ in loader)
            for first in range(0, self.manifest.parts, world_size()):
                if (part := first + rank()) in self.parts:
                    self._write_part(part, tensors, progress)
                barrier()  # no rank gets so far ahead that waiting for the others ends in a time-out

    def _write_part(self, part: int, batches: Iterator[Tensor], progress: Callable[[int], object]) -> None:
        left = len(self.manifest.of_part(part))
        with replace_file(self.manifest.path(self.folder, part)) as file:
            file.write(self.manifest.header(part))
            while left:
                images = next(batches)
                file.write(self._rows(images))
                left -= len(images)
                progress(len(images))

    def _rows(self, images: Tensor) -> np.ndarray:
        """(B, views, width) in the cache's dtype."""
        began = time.perf_counter()
        views = [images, images.flip(-1)] if self.manifest.flips else [images]
        rows = torch.stack([_flatten(self._teach(view)) for view in views], 1)
        kept = rows.to(getattr(torch, self.manifest.dtype))
        if not kept.isfinite().all():
            raise CacheError(_not_finite(rows, self.manifest))
        kept = kept.cpu().numpy()
        self.seconds += time.perf_counter() - began
        self.views += kept.shape[0] * kept.shape[1]
        return kept


@contextmanager
def _full_disk_in_words(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"the disk of {folder} is full; the parts made so far stay: make room and run the same `lfcc cache` again",
        ) from error


def _flatten(outputs: TeacherOutputs) -> Tensor:
    """(B, width) float32, as `TeacherCache.outputs` takes it apart."""
    return torch.cat([values.float().flatten(1) for values in (outputs.logits, *(outputs.pyramids or []))], 1)


def _not_finite(rows: Tensor, manifest: Manifest) -> str:
    if rows.isfinite().all():
        return (
            f"the teacher's outputs reach {rows.abs().max():.4g}, which {manifest.dtype} cannot hold: make the cache "
            "with --cache-dtype float32, in another folder"
        )
    return (
        f"the teacher's outputs in {manifest.precision} are not all finite: check its weights, or make the cache with "
        "--no-amp, in another folder"
    )


def in_units(size: float) -> str:
    """Bytes in words, in powers of 1000, as disks are sold."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
