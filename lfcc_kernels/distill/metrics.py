"""What the loop measures: terms summed on the device, and the seconds that each part of a step takes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from .ranks import gather_objects

PARTS = ("data", "teacher", "student", "loss", "gather", "backward", "update")
SHARES = ("data", "teacher", "loss", "gather")  # the parts whose share of the time is logged


class StepTimer:
    """Splits a training step into `PARTS`.

    "loss" is forward and backward of everything behind the student's outputs, "gather" the wait for other ranks' rows
    on their way there. `lap(part)` books the time since the last lap on `part`. On a GPU the marks are CUDA events, so
    nothing waits before `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._laps: list[tuple[str, float, float] | tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.restart()

    def restart(self) -> None:
        """Leave the time since the last lap out."""
        self._last = self._now()

    def lap(self, part: str) -> None:
        now = self._now()
        self._laps.append((part, self._last, now))
        self._last = now

    def read(self) -> dict[str, float]:
        """Seconds by part since the last `read`."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for part, start, end in self._laps:
            seconds[part] += start.elapsed_time(end) / 1e3 if self._cuda else end - start
        self._laps.clear()
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Window:
    """Sums over the updates since the last `read`, where alone the host waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.timer = StepTimer(device)
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._counts = Counter[str]()

    def add(self, terms: Mapping[str, Tensor], images: int) -> None:
        """Add one update: its terms as 0-d tensors, the same names every time, and its number of images."""
        values = torch.stack([term.float() for term in terms.values()])
        self._names = list(terms)
        self._sums = values if self._sums is None else self._sums + values
        self._counts.update(updates=1, images=images)

    def read(self) -> dict[str, float]:
        """Sums of the terms, "updates" and "seconds_<part>", as means over ranks, and "images" of all ranks.

        Then starts anew. Every rank gets the same.
        """
        sums = [] if self._sums is None else self._sums.tolist()
        totals = dict(zip(self._names, sums, strict=True)) | dict(self._counts)
        totals |= {f"seconds_{part}": seconds for part, seconds in self.timer.read().items()}
        self._sums = None
        self._counts.clear()
        ranks = gather_objects(totals)
        return {name: sum(r[name] for r in ranks) / (1 if name == "images" else len(ranks)) for name in totals}


def seconds(totals: Mapping[str, float]) -> float:
    return sum(totals[f"seconds_{part}"] for part in PARTS)


def means(totals: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """A row of the log: mean terms raw and weighted, mean gradient norm, images/s, shares of the time."""
    updates, elapsed = totals["updates"], seconds(totals)
    row = {"loss": totals["loss"] / updates}
    for name, weight in weights.items():
        row[name] = totals[name] / updates
        row[f"{name}_weighted"] = weight * row[name]
    row["grad_norm"] = totals["grad_norm"] / updates
    row["images_per_second"] = totals["images"] / elapsed
    return row | {f"{part}_share": totals[f"seconds_{part}"] / elapsed for part in SHARES}
