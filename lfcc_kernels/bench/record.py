"""The record of a benchmark: its schema, its JSON and CSV file, each written whole or not at all.

    {"schema": 3, "request": Request, "runs": {NAME: {"environment": Machine.environment(), "rows": [Row, ...]}}}

NAME is "default" or "kept" (the heap of a CPU) or "cuda". The CSV file beside it has one line a row: the columns of
`KEYS`, which say where it was measured, then the fields of `Row`. Every table and picture is drawn from a record alone.
"""

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from lfcc_kernels.files import replace_file

SCHEMA = 3
NOT_REACHED = "not reached yet"  # the note of a case that is left to measure
BASELINE = "without the loss"  # the candidate that is a training step with the loss left out

VERSIONS = ("torch", "lfcc_kernels", "commit")
KEYS = ("device", *VERSIONS, "started")  # of the environment, which every line of the CSV file repeats


@dataclass(frozen=True)
class Request:
    """What was asked to be measured; `lfcc bench --resume` goes on with it."""

    suites: list[str]
    device: str  # "cpu" or "cuda"
    size: str  # "full", "quick", or for a smoke test "tiny"
    dtype: str | None = None  # of all cases, instead of their own
    backend: str | None = None  # that serves "ours", instead of the one that `auto` takes
    peers: list[str] = field(default_factory=list)  # the only ones beside ours and eager; all where empty
    words: list[str] = field(default_factory=list)  # of which a case's name must have one; all where empty


@dataclass(frozen=True)
class Row:
    """One candidate in one case in one run. None is: not measured, or does not apply."""

    case: str  # unique name of the case, of which the next five are parts
    suite: str  # lowpass, info_nce, lfcc, step, scaling or overhead
    label: str
    shape: list[int]
    dtype: str
    mode: str  # "fwd" (no gradient wanted) or "fwd+bwd"
    axis: str  # what grows along the series that the case belongs to: "B", "D", "H*W", "scales", "ranks"; else empty
    x: int | None  # its value in this case
    op: str  # the op that is measured alone, "lowpass" or "info_nce"; else empty
    size: int  # of its call, as `auto` goes by: elements of the map, or pairs of rows
    bytes: int  # least bytes to move
    flops: int  # least FLOPs to do
    formula: str  # how the two are counted
    run: str  # "default" or "kept", the heap of a CPU (machine.KEPT_HEAP); "cuda" on a GPU
    candidate: str  # "ours", "ours, BACKEND" by another backend than `auto` takes, BASELINE, or a peer
    backend: str  # that served ours, "auto" where several ops may have had several; empty for a peer
    # "ok"; not timed: "wrong" (disagrees with the reference), "failed" (raised), "skipped" (not installed, no time)
    status: str
    note: str  # why it is not ok; where it is, in what way its calls were captured
    error: float | None = None  # largest deviation of result and gradients, over the largest value of each
    reference: str = ""  # dtype of the eager run that `error` is against
    rounds: int = 0  # timings taken, one after the other with the other candidates
    median_ms: float | None = None  # of one call, on inputs in the dtype and layout that the candidate asks for
    q20_ms: float | None = None
    q80_ms: float | None = None
    conversion: str = ""  # what a user of the case's inputs must convert them to first
    conversion_ms: float | None = None  # what that costs, and in "fwd+bwd" the way back of the gradients; not in median
    share_of_step: float | None = None  # 1 - (the step without the loss) / median_ms
    input_copies: int = 0  # sets of inputs taken in turn, so that none is in the last cache when its turn comes
    copy_gbps: float | None = None  # median of the copy bandwidths measured between the rounds of this case
    gemm_gflops: float | None = None  # the same for a GEMM: on a CPU in float32, on a GPU in the case's dtype
    # Median over rounds of floor / time, 1 is perfect: the floor is the sum over steps of
    # max(bytes / copy bandwidth, FLOPs / GEMM rate), at the rates measured just before: a shared machine's change.
    fraction_of_floor: float | None = None
    speedup_over_eager: float | None = None  # median of "eager" / median_ms
    peak_memory_bytes: int | None = None  # beyond inputs, result and gradients; on a CPU in a process of its own
    load_average: float | None = None  # of the last minute when the case began, this benchmark's own work included
    clock_mhz: float | None = None  # of the device when the case began

    @property
    def name(self) -> str:
        """The candidate as tables and plots show it: "lfcc", "lfcc (BACKEND)", or the peer."""
        return (
            f"lfcc ({self.candidate.removeprefix('ours, ')})".removesuffix(" (ours)") if self.ours else self.candidate
        )

    @property
    def ours(self) -> bool:
        """Whether the candidate is lfcc, on any backend."""
        return self.candidate == "ours" or self.candidate.startswith("ours, ")

    @property
    def peer(self) -> bool:
        """Whether it computes the same and is not ours."""
        return not self.ours and self.candidate != BASELINE


def new(request: Request) -> dict:
    """A record without rows."""
    return {"schema": SCHEMA, "request": asdict(request), "runs": {}}


def put(results: dict, run: str, environment: dict, rows: Iterable[Row]) -> None:
    """Set what a run holds."""
    results["runs"][run] = {"environment": environment, "rows": [asdict(row) for row in rows]}


def save(path: Path, results: dict) -> None:
    """Write the JSON file, and the CSV file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in (
        (path, json.dumps(results, indent=1, allow_nan=False) + "\n"),
        (csv_path(path), _csv(results)),
    ):
        with replace_file(target) as file:
            file.write(text.encode())


def load(path: str | Path) -> dict:
    """The record in a JSON file; ValueError where it is none, or one of another schema."""
    try:
        results = json.loads(Path(path).read_text())
        schema = results["schema"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} is no record of lfcc bench: expected its JSON file") from None
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema {schema!r}; this version reads schema {SCHEMA}, measure again")
    return results


def request(results: dict) -> Request:
    """What the record was asked for."""
    return Request(**results["request"])


def rows(results: dict) -> list[Row]:
    """The rows of all runs."""
    return [row for run in results["runs"].values() for row in rows_of(run)]


def rows_of(run: dict) -> list[Row]:
    """The rows of one run."""
    return [Row(**row) for row in run["rows"]]


def csv_path(path: Path) -> Path:
    """The CSV file of a record."""
    return path.with_suffix(".csv")


def _csv(results: dict) -> str:
    text = io.StringIO()
    columns = [*KEYS, *(f.name for f in fields(Row))]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for run in results["runs"].values():
        place = {key: run["environment"].get(key, "") for key in KEYS}
        for row in run["rows"]:
            writer.writerow({**place, **row, "shape": "x".join(map(str, row["shape"]))})
    return text.getvalue()
