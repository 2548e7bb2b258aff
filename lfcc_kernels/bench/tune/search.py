"""The search of `lfcc bench --tune`: candidates, measurement and selection.

Launchers read the dict cached by `tiles.table` in every call, so a candidate is tried by changing that dict during a
call.
"""

import copy
import functools
import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor

from lfcc_kernels.bench.tune.cases import Case, Crossover, Sizes, chunk_cases, crossovers, kernel_cases
from lfcc_kernels.bench.tune.launches import compiling, counting_spills

ROUNDS = 11
MARGIN = 1.02  # least speedup over the entry of the table
MOST_CANDIDATES = 16
WARPS, STAGES = (4, 8), (1, 2, 3, 4)
CHUNK_BYTES = [size << 20 for size in (8, 16, 32, 64)]

Clock = Callable[[Callable[[], object]], float]
Times = tuple[list[list[float]], Counter[str]]


class Rejected(ValueError):
    """The reason for which a candidate is excluded."""


def candidates(tiles: Mapping[str, int]) -> list[dict[str, int]]:
    """Configurations to try: the given one, then its neighbours, so that a second run continues from the winner."""
    blocks = [name for name in tiles if name.startswith("BLOCK_")]
    found = [dict(tiles)]
    if "num_stages" in tiles:
        found += [{**tiles, "num_stages": stages} for stages in STAGES]
    if "num_warps" in tiles:
        larger = [dict(tiles), *({**tiles, name: 2 * tiles[name]} for name in blocks)]
        found += [{**one, "num_warps": warps} for one in larger for warps in WARPS]
    others = [{**tiles, **dict(zip(blocks, sizes, strict=True))} for sizes in _grid([tiles[name] for name in blocks])]
    found += sorted(others, key=lambda one: sum(one[name] != tiles[name] for name in blocks))
    return [one for n, one in enumerate(found) if one not in found[:n]][:MOST_CANDIDATES]


def _grid(blocks: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every block halved, kept and doubled, but not below 16, the minimum of tl.dot."""
    return itertools.product(*((b // 2, b, 2 * b) if b > 16 else (b, 2 * b, 4 * b) for b in blocks))


def best(scores: Sequence[float]) -> int:
    """Index of the least score; 0, the incumbent, unless another is less by more than the margin."""
    least = min(range(len(scores)), key=scores.__getitem__)
    return least if scores[least] * MARGIN < scores[0] else 0


def geometric_mean(seconds: Sequence[float]) -> float:
    """Infinite if one of them is."""
    return math.exp(statistics.fmean(map(math.log, seconds)))


class Tuner:
    """Tunes the entries of `table`, the dict that launchers read; `say` prints progress."""

    def __init__(self, table: dict[str, Any], sizes: Sizes, clock: Clock, say: Callable[[str], None]) -> None:
        self.table, self.sizes, self.clock, self.say = table, sizes, clock, say

    def tune(self) -> tuple[dict[str, Any], list[str]]:
        """The tuned table, and the names of the entries that could not be measured and are unchanged."""
        before, kept = copy.deepcopy(self.table), []
        try:
            jobs = self._jobs()
            for number, (name, job) in enumerate(jobs.items(), 1):
                try:
                    outcome = job()
                except Exception as error:  # an entry that fails does not stop the others
                    kept.append(name)
                    outcome = f"unchanged: {_reason(error)}"
                self.say(f"[{number}/{len(jobs)}] {name}: {outcome}")
            return copy.deepcopy(self.table), kept
        finally:
            self.table.clear()
            self.table.update(before)

    def _jobs(self) -> dict[str, Callable[[], str]]:
        """Functions that tune one entry each and return the outcome. Crossovers come last, as they depend on tiles."""
        readers = self._readers()
        jobs: dict[str, Callable[[], str]] = {}
        for kernel, lines in self.table["kernels"].items():
            for shape_class, tiles in lines.items():
                cases = readers[kernel, shape_class]
                jobs[f"{kernel} {shape_class}"] = partial(self._contest, lines, shape_class, candidates(tiles), cases)
        chunk_bytes = [self.table["chunk_bytes"], *CHUNK_BYTES]
        jobs["chunk_bytes"] = partial(self._contest, self.table, "chunk_bytes", chunk_bytes, chunk_cases(self.sizes))
        for crossover in crossovers(self.sizes):
            jobs[" ".join(crossover.path)] = partial(self._cross, crossover)
        return jobs

    def _readers(self) -> dict[tuple[str, str], list[Case]]:
        """The cases that look up the tiles of a kernel and shape class."""
        cases = kernel_cases(self.sizes)
        self.say(f"compiling {len(cases)} cases")
        readers: dict[tuple[str, str], list[Case]] = defaultdict(list)
        with compiling():
            for case in cases:
                seen: set[tuple[str, str]] = set()
                kernels = {kernel: _Recorder(lines, kernel, seen) for kernel, lines in self.table["kernels"].items()}
                try:
                    with changed(self.table, {"kernels": kernels, **case.settings}):
                        case.triton(*case.inputs())
                except Exception as error:  # e.g. maps that are too large for this GPU
                    self.say(f"{case.name}: {_reason(error)}")
                for line in seen:
                    readers[line].append(case)
        return readers

    def _contest(self, holder: dict[str, Any], key: str, options: Sequence[Any], cases: Sequence[Case]) -> str:
        """Write the option with the least geometric mean over the cases into the table."""
        if not cases:
            raise Rejected("no case uses it")
        times, out = self._times(holder, key, options, cases)
        return _settle(holder, key, options, [geometric_mean(row) for row in times], out)

    def _cross(self, crossover: Crossover) -> str:
        """Write the rule into the table that selects best between the algorithms, by the times of both."""
        *path, key = crossover.path
        holder = functools.reduce(dict.__getitem__, path, self.table)
        (first, second), out = self._times(holder, key, crossover.ways, list(crossover.cases.values()), spills=True)
        rules = [holder[key], *crossover.rules]
        scores = []
        for rule in rules:
            places = zip(crossover.cases, first, second, strict=True)
            scores.append(geometric_mean([a if crossover.takes_first(rule, at) else b for at, a, b in places]))
        return _settle(holder, key, rules, scores, out)

    def _times(
        self, holder: dict[str, Any], key: str, options: Sequence[Any], cases: Sequence[Case], spills: bool = False
    ) -> Times:
        """Median seconds of every option in every case, infinite if it is excluded, and the counts of the reasons.

        An option that spills more registers than the first is excluded, unless `spills`.
        """
        inputs = [case.inputs() for case in cases]

        def call(option: int, case: int) -> Sequence[Tensor]:
            with changed(holder, {key: options[option]}), changed(self.table, cases[case].settings):
                return cases[case].triton(*inputs[case])

        with compiling():
            for pair in itertools.product(range(len(options)), range(len(cases))):
                with suppress(Exception):  # raised again below
                    call(*pair)
        samples: dict[tuple[int, int], list[float]] = {}
        out: Counter[str] = Counter()
        for place, case in enumerate(cases):
            expected, limit = case.eager(*inputs[place]), None
            for option in range(len(options)):
                try:
                    count = _check(partial(call, option, place), expected, case.tolerance, limit)
                except Exception as error:
                    out[str(error) if isinstance(error, Rejected) else type(error).__name__] += 1
                    continue
                limit = count if option == 0 and not spills else limit
                samples[option, place] = []
        for turn in range(ROUNDS):
            first = turn * len(samples) // ROUNDS  # each round begins with another pair
            for pair in [*samples][first:] + [*samples][:first]:
                samples[pair].append(self.clock(partial(call, *pair)))
        medians = {pair: statistics.median(seconds) for pair, seconds in samples.items()}
        return [[medians.get((o, c), math.inf) for c in range(len(cases))] for o in range(len(options))], out


def _check(
    call: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor], tolerance: float, limit: int | None
) -> int:
    """The number of spilled registers; raises if they exceed the limit or the results differ from those expected."""
    with counting_spills() as spills:
        results = call()
    for got, right in zip(results, expected, strict=True):
        deviation = (got.float() - right.float()).abs().max() / right.abs().max()
        if not deviation <= tolerance:
            raise Rejected("differs from eager")
    if limit is not None and sum(spills) > limit:
        raise Rejected("spills")
    return sum(spills)


def _settle(
    holder: dict[str, Any], key: str, options: Sequence[Any], scores: Sequence[float], out: Mapping[str, int]
) -> str:
    """Write the best option into the table; returns the outcome in words."""
    winner = best(scores)
    reasons = ", ".join(f"{count} x {reason}" for reason, count in out.items())
    if scores[winner] == math.inf:
        raise Rejected(f"nothing runs ({reasons})")
    holder[key] = copy.deepcopy(options[winner])
    outcome = f"{options[winner]}, {scores[0] / scores[winner]:.2f} times as fast" if winner else "kept"
    return f"{outcome} (excluded: {reasons})" if reasons else outcome


@contextmanager
def changed(mapping: dict[str, Any], entries: Mapping[str, Any]) -> Iterator[None]:
    """Replaces these entries of the mapping within the block."""
    before = {key: mapping[key] for key in entries}
    mapping.update(entries)
    try:
        yield
    finally:
        mapping.update(before)


class _Recorder(dict):
    """The tiles of a kernel by shape class; records which are looked up."""

    def __init__(self, lines: Mapping[str, Any], kernel: str, seen: set[tuple[str, str]]) -> None:
        super().__init__(lines)
        self._kernel, self._seen = kernel, seen

    def __getitem__(self, shape_class: str) -> Any:
        self._seen.add((self._kernel, shape_class))
        return super().__getitem__(shape_class)


def _reason(error: Exception) -> str:
    first_line = next(iter(str(error).splitlines()), "")
    return first_line[:200] if isinstance(error, Rejected) else f"{type(error).__name__}: {first_line[:200]}"
