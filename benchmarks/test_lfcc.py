"""pytest-benchmark over the cases of benchmarks/cases/lfcc.py."""

import pytest

from benchmarks.cases import cases


@pytest.mark.parametrize("case", cases("lfcc"), ids=lambda case: case.name)
def test_lfcc(case, compete):
    compete(case)


@pytest.mark.parametrize("case", cases("lfcc_memory"), ids=lambda case: case.name)
def test_memory(case, weigh):
    weigh(case)
