"""The results file: its schema, written atomically, the runs of both heaps of a CPU side by side.

    {"schema": 2, "runs": {"default": RUN, "kept": RUN}}, or {"schema": 2, "runs": {"cuda": RUN}}
    RUN = {"environment": Machine.environment(), "rows": [Row, ...]}

Every table is drawn from this file alone.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from benchmarks import machine

SCHEMA = 2


@dataclass(frozen=True)
class Row:
    """One candidate in one case under one heap. None is: not measured, or does not apply."""

    case: str  # unique name of the case, of which the next five are parts
    suite: str  # lowpass, info_nce, lfcc or overhead
    label: str
    shape: list[int]
    dtype: str
    mode: str  # "fwd" (no gradient wanted) or "fwd+bwd"
    bytes: int  # least bytes to move
    flops: int  # least FLOPs to do
    formula: str  # how the two are counted
    heap: str  # "default", or "kept" (machine.KEPT_HEAP); "cuda" on a GPU
    candidate: str  # "ours" or a peer
    # "ok"; not timed: "wrong" (disagrees with the reference), "failed" (raised), "skipped" (not installed, no time)
    status: str
    note: str  # why it is not ok; where it is, in what way its calls were captured
    error: float | None = None  # largest deviation of result and gradients, over the largest value of each
    reference: str = ""  # dtype of the eager run that `error` is against
    rounds: int = 0  # timings taken, one after the other with the other candidates
    median_ms: float | None = None  # of one call
    q20_ms: float | None = None
    q80_ms: float | None = None
    input_copies: int = 0  # sets of inputs taken in turn, so that none is in the last cache when its turn comes
    copy_gbps: float | None = None  # median of the copy bandwidths measured between the rounds of this case
    gemm_gflops: float | None = None  # the same for a GEMM: on a CPU in float32, on a GPU in the case's dtype
    # Median over rounds of floor / time, 1 is perfect: the floor is the sum over steps of
    # max(bytes / copy bandwidth, FLOPs / GEMM rate), at the rates measured just before: a shared machine's change.
    fraction_of_floor: float | None = None
    speedup_over_eager: float | None = None  # median of "eager" / median_ms
    peak_memory_bytes: int | None = None  # beyond inputs, result and gradients; on a CPU in a process of its own


def default_path() -> Path:
    """LFCC_BENCH_RESULTS, or results/<device>/<date>.json here; a smoke test's goes to build/."""
    if path := os.environ.get("LFCC_BENCH_RESULTS"):
        return Path(path).resolve()
    here = Path(__file__).resolve().parent
    folder = here.parent / "build" / "benchmarks" if machine.TINY else here / "results" / machine.HERE.name()
    return folder / f"{datetime.now():%Y-%m-%d-%H%M}.json"


def save(path: Path, run: str, environment: dict, rows: Iterable[Row]) -> None:
    """Put this run into the file at `path`, beside the other heap's where it is there."""
    runs = load(path)["runs"] if path.exists() else {}
    runs[run] = {"environment": environment, "rows": [asdict(row) for row in rows]}
    text = json.dumps({"schema": SCHEMA, "runs": runs}, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> dict:
    """The results file; ValueError where it has another schema."""
    results = json.loads(path.read_text())
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {results.get('schema')!r}; this version reads schema {SCHEMA}")
    return results


def rows(results: dict) -> list[Row]:
    """The rows of all runs."""
    return [Row(**row) for run in results["runs"].values() for row in run["rows"]]
