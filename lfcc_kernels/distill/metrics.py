"""Metrics of the training loop: loss terms summed on the device, and the time of each phase of a step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .distributed import gather_objects

PHASES = ("data", "teacher", "student", "loss", "gather", "backward", "update")
SHARES = ("data", "teacher", "loss", "gather")  # phases whose share of the time is logged


class StepTimer:
    """Splits the time of a training step into `PHASES`.

    "loss" is the forward and backward pass after the student's outputs; "gather" is the wait for the rows of other
    ranks in it. `mark(phase)` adds the time since the last mark to `phase`. On a GPU the marks are CUDA events, so the
    host does not wait before `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []  # phase, its start and end
        self.restart()

    def restart(self) -> None:
        """Discard the time since the last mark."""
        self._last = self._now()

    def mark(self, phase: str) -> None:
        now = self._now()
        self._marks.append((phase, self._last, now))
        self._last = now

    def read(self) -> dict[str, float]:
        """Seconds per phase since the last `read`."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for phase, start, end in self._marks:
            seconds[phase] += start.elapsed_time(end) / 1e3 if self._cuda else end - start
        self._marks.clear()
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class MetricAccumulator:
    """Sums over the updates since the last `read`; only `read` waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.timer = StepTimer(device)
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._counts = Counter[str]()

    def add(self, terms: Mapping[str, Tensor], images: int) -> None:
        """Add one update: its terms as 0-d tensors, with the same names in every update, and its number of images."""
        values = torch.stack([term.float() for term in terms.values()])
        self._names = list(terms)
        self._sums = values if self._sums is None else self._sums + values
        self._counts.update(updates=1, images=images)

    def read(self) -> dict[str, float]:
        """Return the sums and reset them; the result is the same on every rank.

        The terms, "updates" and "seconds_<phase>" are averaged over ranks, "images" is summed.
        """
        sums = [] if self._sums is None else self._sums.tolist()
        totals = dict(zip(self._names, sums, strict=True)) | dict(self._counts)
        totals |= {f"seconds_{phase}": seconds for phase, seconds in self.timer.read().items()}
        self._sums = None
        self._counts.clear()
        ranks = gather_objects(totals)
        return {name: sum(r[name] for r in ranks) / (1 if name == "images" else len(ranks)) for name in totals}


def seconds(totals: Mapping[str, float]) -> float:
    return sum(totals[f"seconds_{phase}"] for phase in PHASES)


def means(totals: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """A row of the log: mean terms, raw and weighted, mean gradient norm, images/s, and shares of the time."""
    updates, elapsed = totals["updates"], seconds(totals)
    row = {"loss": totals["loss"] / updates}
    for name, weight in weights.items():
        row[name] = totals[name] / updates
        row[f"{name}_weighted"] = weight * row[name]
    row["grad_norm"] = totals["grad_norm"] / updates
    row["images_per_second"] = totals["images"] / elapsed
    return row | {f"{phase}_share": totals[f"seconds_{phase}"] / elapsed for phase in SHARES}
