"""Rows and records with made-up numbers."""

from lfcc_kernels.bench import record
from lfcc_kernels.bench.record import Request, Row

ENVIRONMENT = {
    "device": "Abacus 9000",
    "cores": 2,
    "threads": 2,
    "cpu_capability": "AVX2",
    "torch": "2.14.1",
    "lfcc_kernels": "0.1.0",
    "backends": ["eager", "cpu"],
    "commit": "0123456789ab",
    "started": "2026-11-23T05:06:27+00:00",
    "load_average": 0.5,
}


def row(case: str, candidate: str, **fields) -> Row:
    """A row of a case with a name like "lowpass-nchw-2x8x4x4-float32-fwd", by default with a median of 1 ms.

    The quantiles are 10 % below and above the median. A row whose status is not "ok" has no times.
    """
    suite, rest = case.split("-", 1)
    label, shape, dtype, mode = rest.rsplit("-", 3)
    timed = fields.get("status", "ok") == "ok"
    median = fields.get("median_ms", 1.0) if timed else None
    defaults = {
        "suite": suite,
        "label": label,
        "shape": [int(side) for side in shape.split("x")],
        "dtype": dtype,
        "mode": mode,
        "axis": "",
        "x": None,
        "op": suite if suite in ("lowpass", "info_nce") else "",
        "size": 0,
        "bytes": 10**6,
        "flops": 0,
        "formula": "X bytes",
        "run": "default",
        "backend": "cpu" if candidate == "lfcc" else candidate.partition("lfcc, ")[2],
        "status": "ok",
        "note": "",
        "error": 1e-7,
        "reference": "float64",
        "copy_gbps": 10.0,
        "gemm_gflops": 100.0,
    }
    times = {"rounds": 7, "median_ms": median, "q20_ms": 0.9 * median, "q80_ms": 1.1 * median} if timed else {}
    return Row(case=case, candidate=candidate, **{**defaults, **times, **fields})


def results(*rows: Row, size: str = "full") -> dict:
    """A record with these rows, each in its run."""
    made = record.new(Request(suites=sorted({row.suite for row in rows}), device="cpu", size=size))
    for run in dict.fromkeys(row.run for row in rows):
        record.put(made, run, ENVIRONMENT, (row for row in rows if row.run == run))
    return made
