import os
import subprocess
import sys
from pathlib import Path

import pytest
from measure import Kernel, load

TABLE = pytest.StashKey[str]()
CUDA_TABLE = pytest.StashKey[list[str]]()


@pytest.fixture(scope="module")
def launches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """All launches, including failed ones, from another process: here kernels may be decorated for the interpreter."""
    result = tmp_path_factory.mktemp("offline") / "kernels.json"
    script = Path(__file__).with_name("harness.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, script, "--json", result], env=environment, capture_output=True, text=True, check=False
    )
    assert result.exists(), run.stderr
    request.config.stash[TABLE] = run.stdout
    return load(result.read_text())


@pytest.fixture
def kernels(launches: list[Kernel]) -> list[Kernel]:
    return [kernel for kernel in launches if not kernel.error]


@pytest.fixture(scope="session")
def cuda_table(request: pytest.FixtureRequest) -> list[str]:
    """The lines about CUDA kernels in the summary."""
    return request.config.stash.setdefault(CUDA_TABLE, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The resources of the compiled kernels, whether or not a test failed."""
    if table := config.stash.get(TABLE, ""):
        terminalreporter.section("Triton kernels, compiled without a GPU")
        terminalreporter.write(table)
    if lines := config.stash.get(CUDA_TABLE, []):
        terminalreporter.section("CUDA kernels: instantiations, registers, static shared memory")
        terminalreporter.write("\n".join([*lines, ""]))
