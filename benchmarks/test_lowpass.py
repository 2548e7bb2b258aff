"""pytest-benchmark over the cases of benchmarks/cases/lowpass.py."""

import pytest

from benchmarks.cases import cases


@pytest.mark.parametrize("case", cases("lowpass"), ids=lambda case: case.name)
def test_lowpass(case, compete):
    compete(case)
