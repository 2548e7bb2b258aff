"""Every case, in one place: its inputs, its candidates, the least it must cost, and how that is counted."""

from benchmarks.cases import info_nce, lfcc, lowpass, overhead
from benchmarks.cases.base import Candidate, Case, Step, with_other_backends
from benchmarks.machine import TINY

__all__ = ["SUITES", "Candidate", "Case", "Step", "cases"]

# The longest comes last, for a run whose time is limited.
SUITES = {
    "overhead": overhead.cases,
    "lowpass": lowpass.cases,
    "lfcc": lfcc.cases,
    "lfcc_memory": lfcc.memory_cases,
    "info_nce": info_nce.cases,
}


def cases(suite: str, tiny: bool = TINY) -> list[Case]:
    """The cases of a suite for the machine that is measured; tiny ones in the same order, with shapes cut down."""
    return [with_other_backends(case) for case in SUITES[suite](tiny)]
