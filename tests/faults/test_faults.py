"""Every fault of faults.toml still applies, and the table of README.md is about these faults."""

import shlex

import pytest
from study import ROOT, Fault, load_faults, read_table

FAULTS = load_faults()


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault_applies(fault: Fault) -> None:
    text = (ROOT / fault.file).read_text()
    assert fault.plant(text) != text
    assert all((ROOT / word).is_file() for word in shlex.split(fault.tests) if word.endswith(".py"))


def test_there_are_enough_on_every_backend() -> None:
    places = [fault.file for fault in FAULTS.values()]
    assert len(places) >= 24
    for place in ("csrc/cpu", "csrc/cuda", "lfcc_kernels/backends/triton", "lfcc_kernels/ops", "lfcc_kernels/distill"):
        assert sum(file.startswith(f"{place}/") for file in places) >= 3, place


def test_table_is_of_these_faults_and_all_are_killed() -> None:
    rows = read_table()
    assert list(rows) == [name for name in FAULTS if name in rows]
    for name, row in rows.items():
        assert row.file == FAULTS[name].file
        assert row.killed, f"{name} survives: run tests/faults/study.py {name}"
