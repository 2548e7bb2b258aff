"""Changes between two records of the same device and size: `lfcc bench --compare OLD NEW`.

lfcc is compared on every backend, between rows of the same run, case and candidate. If the whole machine has become
slower, the peers show it, because their code is the same:

    ratio = new / old median of lfcc            drift = median over the peers of their new / old medians, or 1
    noise = half the 20 to 80 % spread of lfcc in OLD and in NEW and of the peers' ratios, each relative to its
            median, summed; at least 5 %
    slower if ratio / drift > 1 + noise         faster if ratio / drift < 1 / (1 + noise)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lfcc_kernels.bench import record
from lfcc_kernels.bench.record import NOT_REACHED, Row
from lfcc_kernels.text import aligned

LEAST_NOISE = 0.05
LEAST_GROWTH = 2**20  # bytes; smaller growth of memory is not reported
TIMES = ("slower", "faster")
ABSENT = ("only in OLD", "only in NEW")
FAILURES = ("slower", "broken")

Key = tuple[str, str, str]  # run, case, candidate


@dataclass(frozen=True)
class Change:
    """One difference between the records."""

    what: str  # "slower", "faster", "broken", "memory", "error", "only in OLD" or "only in NEW"
    run: str
    case: str
    candidate: str
    old: float | None = None  # milliseconds, bytes, or relative error
    new: float | None = None
    drift: float = 1.0
    noise: float = 0.0
    note: str = ""  # reason of "broken"

    @property
    def slowdown(self) -> float:
        return self.new / self.old / self.drift

    @property
    def title(self) -> str:
        return f"{self.run}, {self.case}, {record.display(self.candidate)}"


def main(old_path: str | Path, new_path: str | Path) -> int:
    """Print the changes; returns 1 if lfcc has become slower or is no longer correct, otherwise 0."""
    changes = compare(record.load(old_path), record.load(new_path))
    print(f"OLD {old_path}\nNEW {new_path}\n\n{text(changes)}")
    return int(any(change.what in FAILURES for change in changes))


def compare(old: dict, new: dict) -> list[Change]:
    """The changes from the record `old` to the record `new`, the worst slowdown first.

    Raises:
        ValueError: the records are of different devices or sizes.
    """
    for what, values in (
        ("size", [record.request(results).size for results in (old, new)]),
        ("device", _devices(old, new)),
    ):
        if values[0] != values[1]:
            raise ValueError(
                f"bench --compare: OLD has {what} {values[0]} but NEW has {what} {values[1]}; "
                f"give two records of the same {what}"
            )
    before, after = _rows(old), _rows(new)
    changes = [
        Change(what, *key)
        for what, some, others in zip(ABSENT, (before, after), (after, before), strict=True)
        for key, row in some.items()
        if row.is_lfcc and key not in others
    ]
    for key, row in before.items():
        if row.is_lfcc and row.status == "ok" and key in after:
            changes += _changes(key, row, after[key], _peer_ratios(before, after, row))
    return sorted(changes, key=lambda change: -change.slowdown if change.what in TIMES else 0)


def text(changes: Sequence[Change]) -> str:
    """The changes as text, with the formula."""
    times = [_time_line(change) for change in changes if change.what in TIMES]
    head = ["", "case", "old ms", "new ms", "new/old", "drift", "without drift", "noise"]
    others = [_line(change) for change in changes if change.what not in (*TIMES, *ABSENT)]
    for what in ABSENT:
        titles = [change.title for change in changes if change.what == what]
        more = f"; and {len(titles) - 5} more" if len(titles) > 5 else ""
        others += [f"{what}: {'; '.join(titles[:5])}{more}"] if titles else []
    counts = [f"{sum(change.what == what for change in changes)} {what}" for what in (*TIMES, "broken")]
    formula = __doc__.partition("\n\n")[2].strip()
    parts = [formula, "\n".join(aligned([head, *times], left=2)) if times else "", "\n".join(others), ", ".join(counts)]
    return "\n\n".join(part for part in parts if part)


def _devices(*records: dict) -> list[str]:
    found = ({run["environment"].get("device", "") for run in results["runs"].values()} - {""} for results in records)
    return [", ".join(sorted(names)) or "none" for names in found]


def _rows(results: dict) -> dict[Key, Row]:
    """The rows that were reached."""
    rows = (row for row in record.rows(results) if row.note != NOT_REACHED)
    return {(row.run, row.case, row.candidate): row for row in rows}


def _peer_ratios(before: dict[Key, Row], after: dict[Key, Row], lfcc: Row) -> list[float]:
    """New over old median of every peer in the case."""
    return [
        after[key].median_ms / row.median_ms
        for key, row in before.items()
        if key[:2] == (lfcc.run, lfcc.case)
        and not row.is_lfcc
        and row.median_ms
        and key in after
        and after[key].median_ms
    ]


def _changes(key: Key, old: Row, new: Row, peers: Sequence[float]) -> Iterable[Change]:
    if new.status != "ok":
        yield Change("broken", *key, note=f"{new.status}: {new.note}")
        return
    if old.median_ms and new.median_ms:
        ratios, quantiles = (torch.tensor(some, dtype=torch.float64) for some in (peers or [1.0], [0.2, 0.5, 0.8]))
        low, drift, high = ratios.quantile(quantiles).tolist()
        spread = (high - low) / drift + sum((row.q80_ms - row.q20_ms) / row.median_ms for row in (old, new))
        noise = max(LEAST_NOISE, spread / 2)
        change = new.median_ms / old.median_ms / drift
        if not 1 / (1 + noise) <= change <= 1 + noise:
            yield Change("slower" if change > 1 else "faster", *key, old.median_ms, new.median_ms, drift, noise)
    memory = old.peak_memory_bytes, new.peak_memory_bytes
    if None not in memory and memory[1] > max(1.1 * memory[0], memory[0] + LEAST_GROWTH):
        yield Change("memory", *key, *memory)
    rounding = torch.finfo(getattr(torch, new.dtype)).eps
    if old.error is not None and new.error is not None and new.error > max(2 * old.error, rounding):
        yield Change("error", *key, old.error, new.error)


def _time_line(change: Change) -> list[str]:
    ratios = (f"{ratio:.2f}x" for ratio in (change.new / change.old, change.drift, change.slowdown))
    return [change.what, change.title, f"{change.old:.4g}", f"{change.new:.4g}", *ratios, f"{change.noise:.0%}"]


def _line(change: Change) -> str:
    numbers = {
        "memory": lambda: f"{change.old / 2**20:.1f} to {change.new / 2**20:.1f} MiB",
        "error": lambda: f"{change.old:.1e} to {change.new:.1e}",
        "broken": lambda: change.note,
    }
    return f"{change.what}: {change.title}, {numbers[change.what]()}"
