"""What has changed between two records of the same device and size: `lfcc bench --compare OLD NEW`.

Ours are compared, by every backend, where run, case and candidate are the same. A machine may be slower on one day than
on another, and that shows in the peers, whose code is the same:

    ratio = new / old median of ours            drift = median over the peers of their new / old medians, else 1
    noise = half the 20 to 80 % spread of ours in OLD and in NEW and of the peers' ratios, each over its median,
            added up, and 5 % at least
    slower where ratio / drift > 1 + noise      faster where ratio / drift < 1 / (1 + noise)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lfcc_kernels.bench import record
from lfcc_kernels.bench.record import NOT_REACHED, Row

LEAST_NOISE = 0.05
LEAST_MEMORY = 2**20  # bytes by which it must have grown
TIMES = ("slower", "faster")
ABSENT = ("only in OLD", "only in NEW")
FAILURES = ("slower", "broken")

Key = tuple[str, str, str]  # run, case, candidate


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was."""

    what: str  # "slower", "faster", "broken", "memory", "error", "only in OLD" or "only in NEW"
    run: str
    case: str
    candidate: str
    old: float | None = None  # ms, bytes, or the error over the largest value
    new: float | None = None
    drift: float = 1.0
    noise: float = 0.0
    note: str = ""  # why it is broken


def main(old_path: str | Path, new_path: str | Path) -> int:
    """Print what has changed; 1 where ours became slower or is no longer right, else 0."""
    changes = compare(record.load(old_path), record.load(new_path))
    print(f"OLD {old_path}\nNEW {new_path}\n\n{text(changes)}")
    return int(any(change.what in FAILURES for change in changes))


def compare(old: dict, new: dict) -> list[Change]:
    """What has changed from the record `old` to the record `new`, the worst slowdown first.

    Raises:
        ValueError: they are of different devices or sizes.
    """
    _check_comparable(old, new)
    before, after = _rows(old), _rows(new)
    changes = [
        Change(what, *key)
        for what, some, others in zip(ABSENT, (before, after), (after, before), strict=True)
        for key, row in some.items()
        if row.ours and key not in others
    ]
    for key, row in before.items():
        if row.ours and row.status == "ok" and key in after:
            changes += _changes(key, row, after[key], _peer_ratios(before, after, row))
    return sorted(changes, key=lambda change: -_slowdown(change) if change.what in TIMES else 0)


def text(changes: Sequence[Change]) -> str:
    """The changes as readable text, with the formula."""
    times = [_time_line(change) for change in changes if change.what in TIMES]
    head = ["", "case", "old ms", "new ms", "new/old", "drift", "without drift", "noise"]
    others = [_line(change) for change in changes if change.what not in (*TIMES, *ABSENT)]
    for what in ABSENT:
        titles = [_title(change) for change in changes if change.what == what]
        more = f"; and {len(titles) - 5} more" if len(titles) > 5 else ""
        others += [f"{what}: {'; '.join(titles[:5])}{more}"] if titles else []
    counts = [f"{sum(change.what == what for change in changes)} {what}" for what in (*TIMES, "broken")]
    formula = __doc__.partition("\n\n")[2].strip()
    parts = [formula, _aligned([head, *times]) if times else "", "\n".join(others), ", ".join(counts)]
    return "\n\n".join(part for part in parts if part)


def _check_comparable(old: dict, new: dict) -> None:
    sizes = [record.request(results).size for results in (old, new)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"OLD is of {sizes[0]} size and NEW of {sizes[1]}; compare records of one size")
    devices = [
        sorted({run["environment"].get("device", "") for run in results["runs"].values()} - {""})
        for results in (old, new)
    ]
    if devices[0] != devices[1]:
        old_names, new_names = (", ".join(names) or "none" for names in devices)
        raise ValueError(f"OLD was measured on {old_names} and NEW on {new_names}; compare records of one device")


def _rows(results: dict) -> dict[Key, Row]:
    """What was reached."""
    rows = (row for row in record.rows(results) if row.note != NOT_REACHED)
    return {(row.run, row.case, row.candidate): row for row in rows}


def _peer_ratios(before: dict[Key, Row], after: dict[Key, Row], ours: Row) -> list[float]:
    """New over old median of everything in the case that is not ours."""
    return [
        after[key].median_ms / row.median_ms
        for key, row in before.items()
        if key[:2] == (ours.run, ours.case) and not row.ours and row.median_ms and key in after and after[key].median_ms
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
            what = "slower" if change > 1 else "faster"
            yield Change(what, *key, old.median_ms, new.median_ms, drift, noise)
    memory = old.peak_memory_bytes, new.peak_memory_bytes
    if None not in memory and memory[1] > max(1.1 * memory[0], memory[0] + LEAST_MEMORY):
        yield Change("memory", *key, *memory)
    rounding = torch.finfo(getattr(torch, new.dtype)).eps
    if old.error is not None and new.error is not None and new.error > max(2 * old.error, rounding):
        yield Change("error", *key, old.error, new.error)


def _slowdown(change: Change) -> float:
    return change.new / change.old / change.drift


def _time_line(change: Change) -> list[str]:
    numbers = (
        f"{change.old:.4g} {change.new:.4g} {change.new / change.old:.2f}x {change.drift:.2f}x {_slowdown(change):.2f}x"
    )
    return [change.what, _title(change), *numbers.split(), f"{change.noise:.0%}"]


def _line(change: Change) -> str:
    match change.what:
        case "memory":
            numbers = f", {change.old / 2**20:.1f} to {change.new / 2**20:.1f} MiB"
        case "error":
            numbers = f", {change.old:.1e} to {change.new:.1e}"
        case _:
            numbers = f", {change.note}" if change.note else ""
    return f"{change.what}: {_title(change)}{numbers}"


def _title(change: Change) -> str:
    return f"{change.run}, {change.case}, {change.candidate}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first two are words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n < 2 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
