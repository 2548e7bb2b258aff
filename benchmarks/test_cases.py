"""pytest-benchmark over the cases of `lfcc bench`: `pytest benchmarks/ -k 7x7`.

The environment variables LFCC_BENCH_DEVICE (cpu, cuda) and LFCC_BENCH_SIZE (full, quick, tiny) select device and size.
"""

import os
from dataclasses import asdict

import pytest

from lfcc_kernels.bench.cases import SUITES, Case, choose
from lfcc_kernels.bench.harness import Benchmark
from lfcc_kernels.bench.machine import open_machine
from lfcc_kernels.bench.record import Request

DEVICE, SIZE = os.environ.get("LFCC_BENCH_DEVICE", "cpu"), os.environ.get("LFCC_BENCH_SIZE", "full")
REQUEST, MACHINE = Request(list(SUITES), DEVICE, SIZE), open_machine(DEVICE, SIZE)


@pytest.mark.parametrize("case", choose(REQUEST, MACHINE), ids=lambda case: case.name)
def test_case(case: Case, benchmark) -> None:
    """pytest-benchmark times lfcc; its set-up runs the peers, so that all candidates are interleaved."""
    try:
        candidates = Benchmark(case, REQUEST, MACHINE)
        if candidates.lfcc.status == "ok":
            benchmark.pedantic(candidates.run_lfcc, setup=candidates.run_peers, rounds=candidates.rounds)
        rows = candidates.rows(candidates.peak_memory())
        benchmark.extra_info.update({row.candidate: asdict(row) for row in rows})
    except NotImplementedError as error:
        pytest.skip(str(error))
    finally:
        case.close()
    if candidates.lfcc.status != "ok":
        pytest.fail(f"lfcc {candidates.lfcc.status}: {candidates.lfcc.note}")
