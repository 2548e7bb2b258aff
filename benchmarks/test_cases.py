"""pytest-benchmark over the cases that `lfcc bench` measures: `pytest benchmarks/ -k 7x7`.

LFCC_BENCH_DEVICE and LFCC_BENCH_SIZE choose the machine and the size.
"""

from dataclasses import asdict

import pytest

from lfcc_kernels.bench import machine
from lfcc_kernels.bench.cases import SUITES, Case, choose
from lfcc_kernels.bench.harness import Contest
from lfcc_kernels.bench.record import Request

REQUEST = Request(list(SUITES), machine.HERE.device.type, machine.SIZE)


@pytest.mark.parametrize("case", choose(REQUEST), ids=lambda case: case.name)
def test_case(case: Case, benchmark) -> None:
    """The benchmark is ours, its set-up runs the peers, so all interleave."""
    try:
        contest = Contest(case, REQUEST)
        if contest.ours.status == "ok":
            benchmark.pedantic(contest.run_ours, setup=contest.run_peers, rounds=contest.rounds)
        benchmark.extra_info.update({row.candidate: asdict(row) for row in contest.rows(contest.peaks())})
    except NotImplementedError as error:
        pytest.skip(str(error))
    finally:
        case.close()
    if contest.ours.status != "ok":
        pytest.fail(f"ours {contest.ours.status}: {contest.ours.note}")
