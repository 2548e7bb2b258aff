"""The record of a benchmark: its schema, and its JSON and CSV files, which are always written completely.

    {"schema": 3, "request": Request, "runs": {NAME: {"environment": Machine.environment(), "rows": [Row, ...]}}}

NAME is "default" or "kept" (the heap of a CPU) or "cuda". The CSV file has one line per row: the columns of `KEYS` from
the environment, then the fields of `Row`. All tables and plots use a record alone.
"""

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from lfcc_kernels.files import write_file

SCHEMA = 3
NOT_REACHED = "not reached yet"  # note of a case that is still to be measured
BASELINE = "without the loss"  # candidate: a training step without the loss

VERSIONS = ("torch", "lfcc_kernels", "commit")
KEYS = ("device", *VERSIONS, "started")  # of the environment, repeated in every line of the CSV file


@dataclass(frozen=True)
class Request:
    """The options of a benchmark, which `lfcc bench --resume` reuses."""

    suites: list[str]
    device: str  # "cpu" or "cuda"
    size: str  # "full", "quick", or "tiny" for a smoke test
    dtype: str | None = None  # of all cases, instead of their own
    backend: str | None = None  # of lfcc, instead of the one that `auto` selects
    peers: list[str] = field(default_factory=list)  # words of which a peer's name must contain one; empty: all
    words: list[str] = field(default_factory=list)  # words of which a case's name must contain one; empty: all


@dataclass(frozen=True)
class Row:
    """One candidate in one case in one run. None: not measured, or not applicable."""

    case: str  # unique name of the case, made of the next five fields
    suite: str  # lowpass, info_nce, lfcc, step, scaling or overhead
    label: str
    shape: list[int]
    dtype: str
    mode: str  # "fwd" (without gradients) or "fwd+bwd"
    axis: str  # the size that varies along the case's series: "B", "D", "H*W", "scales", "ranks", or empty
    x: int | None  # the value of that size
    op: str  # "lowpass" or "info_nce" if the case measures that op alone, otherwise empty
    size: int  # of the op's call, as `auto` looks it up: elements of the map, or pairs of rows
    bytes: int  # least bytes to move
    flops: int  # least FLOPs to compute
    formula: str  # how bytes and FLOPs are counted
    run: str  # "default" or "kept", the heap of a CPU (machine.KEPT_HEAP), or "cuda"
    candidate: str  # "lfcc", "lfcc, BACKEND" (on another backend than `auto` selects), BASELINE, or a peer
    backend: str  # of lfcc; "auto" if several ops may use several; empty for a peer
    # "ok", or not timed: "wrong" (deviates from the reference), "failed" (raised), "skipped" (not installed, no time)
    status: str
    note: str  # the reason if not ok; otherwise how calls were captured
    error: float | None = None  # largest deviation of result and gradients, relative to the largest value of each
    reference: str = ""  # dtype of the eager reference of `error`
    rounds: int = 0  # timings, interleaved with those of the other candidates
    median_ms: float | None = None  # per call, on inputs in the candidate's dtype and layout
    q20_ms: float | None = None
    q80_ms: float | None = None
    conversion: str = ""  # the dtype or layout that the candidate needs
    conversion_ms: float | None = None  # time of that conversion and, in "fwd+bwd", of the gradients back
    share_of_step: float | None = None  # 1 - (time of the step without the loss) / median_ms
    input_copies: int = 0  # sets of inputs in rotation, so that none is in the last-level cache
    copy_gbps: float | None = None  # copy bandwidth, median of measurements between the rounds of this case
    gemm_gflops: float | None = None  # GEMM rate, likewise: on a CPU in float32, on a GPU in the case's dtype
    # Median over rounds of floor / time; 1 is optimal. The floor is the sum over steps of
    # max(bytes / copy bandwidth, FLOPs / GEMM rate), at the rates measured just before, which vary on a shared machine.
    fraction_of_floor: float | None = None
    speedup_over_eager: float | None = None  # median_ms of "eager" / median_ms
    peak_memory_bytes: int | None = None  # beyond inputs, result and gradients; on a CPU in a separate process
    load_average: float | None = None  # of the last minute at the start of the case, including this benchmark
    clock_mhz: float | None = None  # of the device at the start of the case

    @property
    def name(self) -> str:
        """The candidate as tables and plots show it."""
        return display(self.candidate)

    @property
    def is_lfcc(self) -> bool:
        """Whether the candidate is lfcc, on any backend."""
        return self.candidate == "lfcc" or self.candidate.startswith("lfcc, ")

    @property
    def peer(self) -> bool:
        """Whether the candidate is another implementation of the same computation."""
        return not self.is_lfcc and self.candidate != BASELINE


def display(candidate: str) -> str:
    """A candidate as tables and plots show it: "lfcc", "lfcc (BACKEND)", or the peer."""
    return f"lfcc ({candidate.removeprefix('lfcc, ')})" if candidate.startswith("lfcc, ") else candidate


def new(request: Request) -> dict:
    """A record without rows."""
    return {"schema": SCHEMA, "request": asdict(request), "runs": {}}


def put(results: dict, run: str, environment: dict, rows: Iterable[Row]) -> None:
    """Set environment and rows of a run."""
    results["runs"][run] = {"environment": environment, "rows": [asdict(row) for row in rows]}


def save(path: Path, results: dict) -> None:
    """Write the JSON file and the CSV file next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_file(csv_path(path), _csv(results))


def load(path: str | Path) -> dict:
    """The record in a JSON file. Raises ValueError if the file is not a record, or one of another schema."""
    try:
        results = json.loads(Path(path).read_text())
        schema = results["schema"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} is not a record; expected the JSON file that lfcc bench writes") from None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}, but this version reads schema {SCHEMA}; measure again")
    for row in (row for run in results["runs"].values() for row in run["rows"]):
        if row["candidate"].partition(", ")[0] == "ours":  # the name of lfcc in older records
            row["candidate"] = row["candidate"].replace("ours", "lfcc", 1)
    return results


def request(results: dict) -> Request:
    """The request of a record."""
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
