"""The folder of one run: config.yaml, versions.json, steps.csv, summary.csv, events/, checkpoints/.

`checkpoints/last.pt` is where the run goes on, `checkpoints/best.pt` the epoch of the best accuracy, `best-2.pt` that
of the second best, as many as are to be kept.
"""

from __future__ import annotations

import csv
import json
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

import lfcc_kernels
from lfcc_kernels.files import remove_stale, replace_file

from .ranks import is_main


class RunFolder:
    """Names and writes the files of a run. Makes nothing on disk before `prepare` or `log`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.checkpoints = self.root / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"

    def place(self, number: int) -> Path:
        """Where the checkpoint of the best epoch is (1), of the second best (2) and so on."""
        return self.best if number == 1 else self.checkpoints / f"best-{number}.pt"

    def make_place(self, number: int, kept: int) -> None:
        """Move the checkpoints from place `number` on one place down; what leaves place `kept` is gone."""
        for lower in range(kept, number, -1):
            if self.place(lower - 1).exists():
                self.place(lower - 1).replace(self.place(lower))

    def require_empty(self) -> None:
        """Raises FileExistsError if a new run here would mix with something that is there already."""
        if self.root.is_file() or (self.root.is_dir() and any(self.root.iterdir())):
            raise FileExistsError(
                f"{self.root} is not empty: name another --experiment, or go on with its run by --resume"
            )

    def prepare(self, config: Mapping[str, Any]) -> None:
        """Write the resolved configuration and the versions of what runs it, on the main rank."""
        if not is_main():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with replace_file(self.root / "config.yaml") as file:
            file.write(yaml.safe_dump(dict(config), sort_keys=False).encode())
        with replace_file(self.root / "versions.json") as file:
            file.write(json.dumps(versions(), indent=2).encode() + b"\n")

    @contextmanager
    def log(self, step: int) -> Iterator[RunLog]:
        """The run's log, cut back to update `step`: what came after the last checkpoint happens again.

        The main rank alone writes.
        """
        if not is_main():
            yield RunLog()
            return
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        remove_stale(self.root)
        remove_stale(self.checkpoints)
        with (
            _CsvLog(self.root / "steps.csv", step) as steps,
            _CsvLog(self.root / "summary.csv", step) as summary,
            SummaryWriter(str(self.root / "events"), purge_step=step + 1) as events,
        ):
            yield RunLog(steps, summary, events)


class RunLog:
    """Rows of numbers, each with a "step", to CSV and TensorBoard."""

    def __init__(
        self, steps: _CsvLog | None = None, summary: _CsvLog | None = None, events: SummaryWriter | None = None
    ) -> None:
        self._steps, self._summary, self._events = steps, summary, events

    def step(self, row: Mapping[str, float]) -> None:
        """Means over the updates since the last row."""
        self._write(self._steps, "train", row)

    def epoch(self, row: Mapping[str, float]) -> None:
        """Means over an epoch, and the accuracy after it."""
        self._write(self._summary, "epoch", row)

    def _write(self, table: _CsvLog | None, group: str, row: Mapping[str, float]) -> None:
        if table is None:
            return
        table.write(row)
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(f"{group}/{name}", value, row["step"])
        self._events.flush()


class _CsvLog:
    """A CSV file that grows by whole rows; opened, it keeps the rows up to update `step`."""

    def __init__(self, path: Path, step: int) -> None:
        rows = [row for row in _whole_rows(path) if int(row["step"]) <= step]
        self._header = list(rows[0]) if rows else []
        with replace_file(path) as file:
            for row in [self._header, *(row.values() for row in rows)] if rows else []:
                file.write(_line(row).encode())
        self._file = path.open("a", newline="")

    def __enter__(self) -> _CsvLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, row: Mapping[str, float]) -> None:
        if not self._header:
            self._header = list(row)
            self._file.write(_line(self._header))
        self._file.write(_line(row[name] for name in self._header))
        self._file.flush()


def read_csv(path: str | Path) -> list[dict[str, float]]:
    """The rows of steps.csv or summary.csv as numbers, without one cut off; none if there is no file."""
    return [{name: float(value) for name, value in row.items()} for row in _whole_rows(Path(path))]


def _whole_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row.values())]


def _line(values: Iterable[object]) -> str:
    return ",".join(map(str, values)) + "\n"


def versions() -> dict[str, Any]:
    """What runs here: packages, Python, machine, backends, and the commit of a source checkout."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "lfcc-kernels": lfcc_kernels.__version__,
        "torch": torch.__version__,
        **{package: _version(package) for package in ("timm", "torchvision", "triton", "numpy")},
        "backends": list(lfcc_kernels.available_backends()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    source = Path(lfcc_kernels.__file__).parent
    try:
        head = subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()
