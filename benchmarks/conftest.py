"""Runs a case as a pytest-benchmark and collects its rows; at the end the results file is written."""

from collections.abc import Callable
from dataclasses import asdict

import pytest

from benchmarks import machine, record
from benchmarks.cases import Case
from benchmarks.harness import Contest

ROWS = pytest.StashKey[list[record.Row]]()
ENVIRONMENT = pytest.StashKey[dict]()


@pytest.fixture
def compete(benchmark, pytestconfig: pytest.Config) -> Callable[[Case], None]:
    """Time the candidates of a case: the benchmark is ours, its set-up runs the peers, so all interleave."""

    def run(case: Case) -> None:
        contest = Contest(case)
        if contest.ours.status == "ok":
            benchmark.pedantic(contest.run_ours, setup=contest.run_peers, rounds=contest.rounds)
        # After the timing, so that torch.compile finds in its cache what was compiled for it.
        rows = contest.rows(contest.peaks())
        benchmark.extra_info.update({row.candidate: asdict(row) for row in rows})
        pytestconfig.stash[ROWS].extend(rows)
        if contest.ours.status != "ok":
            pytest.fail(f"ours {contest.ours.status}: {contest.ours.note}")

    return run


@pytest.fixture
def weigh(pytestconfig: pytest.Config) -> Callable[[Case], None]:
    """Check the candidates of a case and measure their memory, but take no times."""

    def run(case: Case) -> None:
        if machine.HERE.run == "kept":
            pytest.skip("a kept heap hides the memory that a call takes")
        contest = Contest(case)
        pytestconfig.stash[ROWS].extend(contest.rows(contest.peaks()))

    return run


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[ENVIRONMENT] = machine.HERE.environment()  # the load average is the one before the run


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows = session.config.stash[ROWS]
    if rows:
        path = record.default_path()
        record.save(path, machine.HERE.run, session.config.stash[ENVIRONMENT], rows)
        session.config.get_terminal_writer().line(f"\nresults: {path}")
