"""The CUDA kernels on the CPU under the address and undefined-behaviour sanitizers, in a shuffled schedule.

The sanitizers check addresses, alignment, shifts and indices, which depend on the code path and not on the values, so
each path runs once. They must be loaded when a process starts, so each test process starts one that runs the cases.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from emulation import build
from emulation.cases import CASES

from lfcc_kernels.backends import cuda

pytestmark = pytest.mark.skipif(bool(cuda.missing()) or cuda.device() != "cpu", reason="the kernels are not emulated")

# In the default lane; they run every float32 kernel.
SMOKE = ["filters", "filters, channels_last", "symmetric, ids, none", "torch.float32, a key over a tile"]


class Sanitized:
    """The process, started by the first case and again after a finding."""

    def __init__(self, report: Path) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.report = report

    def __call__(self, case: str) -> str:
        """The answer of the process, or the report of a finding."""
        if self.process is None:
            build.library(sanitize=True)
            with self.report.open("w") as stderr:
                self.process = subprocess.Popen(
                    [sys.executable, Path(__file__).with_name("sanitized.py")],
                    env=os.environ | build.sanitizer_environment() | {"LFCC_SCHEDULE": "5"},
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                )  # fmt: skip
        print(case, file=self.process.stdin, flush=True)
        if answer := self.process.stdout.readline().strip():
            return answer
        self.close()
        return self.report.read_text()

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sanitized]:
    process = Sanitized(tmp_path_factory.mktemp("sanitized") / "report")
    yield process
    process.close()


@pytest.mark.parametrize(
    "case", [case if case in SMOKE else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_under_sanitizers(sanitized: Callable[[str], str], case: str) -> None:
    answer = sanitized(case)
    assert answer == "passed", answer[-4000:]
