"""pytest-benchmark over the cases of benchmarks/cases/overhead.py."""

import pytest

from benchmarks.cases import cases


@pytest.mark.parametrize("case", cases("overhead"), ids=lambda case: case.name)
def test_overhead(case, compete):
    compete(case)
