"""pytest-benchmark over the cases of benchmarks/cases/info_nce.py."""

import pytest

from benchmarks.cases import cases


@pytest.mark.parametrize("case", cases("info_nce"), ids=lambda case: case.name)
def test_info_nce(case, compete):
    compete(case)
