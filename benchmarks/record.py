"""The results file: its schema, written atomically, the runs of both heaps side by side.

    {"schema": 2, "runs": {"default": RUN, "kept": RUN}}
    RUN = {"environment": machine.environment(), "rows": [Row, ...]}

Every table is drawn from this file alone.
"""

import json
import os
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
    heap: str  # "default", or "kept" (machine.KEPT_HEAP)
    candidate: str  # "ours" or a peer
    status: str  # "ok"; "wrong" (disagrees with the reference, not timed); "failed" (raised, not timed)
    note: str  # why it is wrong or failed
    error: float | None  # largest deviation of result and gradients, over the largest value of each
    reference: str  # dtype of the eager run that `error` is against
    rounds: int  # timings taken, one after the other with the other candidates
    median_ms: float | None  # of one call
    q20_ms: float | None
    q80_ms: float | None
    input_copies: int  # sets of inputs taken in turn, so that none is in the last cache when its turn comes
    bytes: int  # least bytes to move
    flops: int  # least FLOPs to do
    formula: str  # how the two are counted
    copy_gbps: float | None  # median of the copy bandwidths measured between the rounds of this case
    gemm_gflops: float | None  # the same for the rates of a float32 GEMM
    # Median over rounds of floor / time, 1 is perfect: the floor is the sum over steps of
    # max(bytes / copy bandwidth, FLOPs / GEMM rate), at the rates measured just before: a shared machine's change.
    fraction_of_floor: float | None
    speedup_over_eager: float | None  # median of "eager" / median_ms
    peak_memory_bytes: int | None  # beyond inputs, result and gradients, in a process of its own


def default_path() -> Path:
    """LFCC_BENCH_RESULTS, or results/<device>/<date>.json here; a smoke test's goes to build/."""
    if path := os.environ.get("LFCC_BENCH_RESULTS"):
        return Path(path).resolve()
    here = Path(__file__).resolve().parent
    folder = here / "results" / machine.device_name()
    if machine.TINY:
        folder = here.parent / "build" / "benchmarks"
    return folder / f"{datetime.now():%Y-%m-%d-%H%M}.json"


def save(path: Path, heap: str, environment: dict, rows: list[Row]) -> None:
    """Put this heap's run into the file at `path`, beside the other heap's where it is there."""
    runs = load(path)["runs"] if path.exists() else {}
    runs[heap] = {"environment": environment, "rows": [asdict(row) for row in rows]}
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
