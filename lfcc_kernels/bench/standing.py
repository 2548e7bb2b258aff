"""Who is how fast in each case of a run, read off the rows of a record."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from lfcc_kernels.bench.record import Row


@dataclass(frozen=True)
class Standing:
    """What was timed in one case of one run: ours, at least one peer, and ours by other backends."""

    ours: Row
    peers: tuple[Row, ...]
    others: tuple[Row, ...] = ()

    @property
    def fastest(self) -> Row:
        """The best of all that is not ours, eager included, by its time without its conversion."""
        return min(self.peers, key=lambda row: row.median_ms)

    @property
    def margin(self) -> float:
        """Time of the fastest peer over ours: below 1 ours loses."""
        return self.fastest.median_ms / self.ours.median_ms

    @property
    def factor(self) -> str:
        """The margin as "2.5x", rounded down where ours loses: no loss reads as a draw."""
        return f"{math.floor(1000 * self.margin) / 1000 if self.margin < 1 else self.margin:.3g}x"

    @property
    def eager(self) -> Row | None:
        return next((row for row in self.peers if row.candidate == "eager"), None)


def standings(rows: Iterable[Row]) -> list[Standing]:
    """The cases in which ours and a peer were timed, those that ours loses first."""
    cases: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.median_ms is not None:
            cases[row.run, row.case].append(row)
    found = []
    for timed in cases.values():
        ours = [row for row in timed if row.candidate == "ours"]
        peers = tuple(row for row in timed if row.peer)
        if ours and peers:
            others = tuple(row for row in timed if row.ours and row.candidate != "ours")
            found.append(Standing(ours[0], peers, others))
    return sorted(found, key=lambda standing: standing.margin)


def title(row: Row) -> str:
    """The case of a row in words."""
    return f"{row.suite} {row.label} {'x'.join(map(str, row.shape))} {row.dtype} {row.mode}"
