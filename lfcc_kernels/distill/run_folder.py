"""The folder of one run: config.yaml, versions.json, steps.csv, summary.csv, events/, checkpoints/.

`checkpoints/last.pt` is the checkpoint to resume from, `checkpoints/best.pt` the one of the most accurate epoch,
`best-2.pt` that of the second most accurate, and so on up to `checkpoint_hist`.
"""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from lfcc_kernels import __version__, available_backends
from lfcc_kernels.files import remove_stale, write_file
from lfcc_kernels.version import commit, package_version

from .distributed import is_main


class RunFolder:
    """Names and writes the files of a run. Creates no files before `prepare` or `log`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.checkpoints = self.root / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"

    def best_path(self, number: int) -> Path:
        """Path of the checkpoint of the best epoch (1), of the second best (2) and so on."""
        return self.best if number == 1 else self.checkpoints / f"best-{number}.pt"

    def rotate_best(self, number: int, kept: int) -> None:
        """Shift the checkpoints `number`, ..., `kept` - 1 by one, which overwrites the checkpoint `kept`."""
        for lower in range(kept, number, -1):
            if self.best_path(lower - 1).exists():
                self.best_path(lower - 1).replace(self.best_path(lower))

    def require_empty(self) -> None:
        """Raises FileExistsError if the folder contains files."""
        if self.root.is_file() or (self.root.is_dir() and any(self.root.iterdir())):
            raise FileExistsError(
                f"{self.root} is not empty: choose another --experiment, or continue its run with --resume"
            )

    def prepare(self, config: Mapping[str, Any]) -> None:
        """Write the resolved configuration and the package versions, on rank 0."""
        if not is_main():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        write_file(self.root / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        write_file(self.root / "versions.json", f"{json.dumps(versions(), indent=2)}\n")

    @contextmanager
    def log(self, step: int) -> Iterator[RunLog]:
        """The log of the run, truncated to update `step`: later updates will be repeated. Only rank 0 writes."""
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
    """Writes rows of numbers, each with a "step", to CSV and TensorBoard."""

    def __init__(
        self, steps: _CsvLog | None = None, summary: _CsvLog | None = None, events: SummaryWriter | None = None
    ) -> None:
        self._steps, self._summary, self._events = steps, summary, events

    def step(self, row: Mapping[str, float]) -> None:
        """Write means over the updates since the last row."""
        self._write(self._steps, "train", row)

    def epoch(self, row: Mapping[str, float]) -> None:
        """Write means over an epoch, and the accuracy after it."""
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
    """Appends rows to a CSV file, after dropping those of updates after `step`."""

    def __init__(self, path: Path, step: int) -> None:
        rows = [row for row in _whole_rows(path) if int(row["step"]) <= step]
        self._header = list(rows[0]) if rows else []
        write_file(path, "".join(map(_line, [self._header, *(row.values() for row in rows)] if rows else [])))
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
    """The complete rows of steps.csv or summary.csv as numbers; empty if the file does not exist."""
    return [{name: float(value) for name, value in row.items()} for row in _whole_rows(Path(path))]


def _whole_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row.values())]


def _line(values: Iterable[object]) -> str:
    return ",".join(map(str, values)) + "\n"


def versions() -> dict[str, Any]:
    """Versions of packages and Python, the machine, the backends, and the commit of a source checkout."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "lfcc-kernels": __version__,
        "torch": torch.__version__,
        **{package: package_version(package) for package in ("timm", "torchvision", "triton", "numpy")},
        "backends": list(available_backends()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "commit": commit() or None,
    }
