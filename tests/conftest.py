"""Backends that tests run on.

Without a GPU, kernels for GPUs run on the CPU: Triton's in its interpreter, which must be selected before Triton is
imported, CUDA's compiled for the CPU (tests/emulation). Tests that need a GPU have the mark `gpu`.
"""

import importlib.util
import os
from collections.abc import Iterator

import grids
import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import lfcc_kernels as lk  # noqa: E402
from lfcc_kernels.ops.dispatch import why_missing  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from interpreter import patch_interpreter

    patch_interpreter()

if not ON_GPU:
    from emulation import build

    build.load()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the full product of every grid of tests")
    parser.addoption("--slice-seed", help="seed of the slice of the grids' other cases (default: the commit)")


def pytest_configure(config: pytest.Config) -> None:
    # The processes of pytest-xdist get the options of this one.
    config.option.slice_seed = config.option.slice_seed or grids.commit()


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if reporter := session.config.pluginmanager.get_plugin("terminalreporter"):
        options = session.config.option
        chosen = "full products" if options.full else f"covering arrays and --slice-seed {options.slice_seed}"
        reporter.write_line(f"grids of tests: {chosen}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    grids.expand(metafunc)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Adds marks that depend on a test's backend and fixtures.

    LFCC_TEST_SHARD=2/8 keeps every eighth test from the second on: most of a test on a GPU is compiling on the CPU, so
    `make gpu` runs eight shards at a time, without further packages.
    """
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        on = {params.get("backend"), params.get("kernels")}
        if ON_GPU and on & {"triton", "cuda"}:
            item.add_marker("gpu")
        if (slow_on := item.get_closest_marker("slow_on")) and on & set(slow_on.args):
            item.add_marker("slow")
        # With `--dist loadgroup` one process computes the fixtures that the tests of a module share.
        if any(fixtures[-1].scope == "module" for fixtures in item._fixtureinfo.name2fixturedefs.values()):
            shared = params.get("ranks", "")
            item.add_marker(pytest.mark.xdist_group(f"{item.location[0]} {shared}"))
    if shard := os.environ.get("LFCC_TEST_SHARD"):
        first, step = map(int, shard.split("/"))
        items[:] = items[first - 1 :: step]


@pytest.fixture(autouse=True)
def fixed_seed_and_one_thread() -> Iterator[None]:
    """Tests are small: on a busy machine threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["eager", "cpu", "triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every backend; skips those that are not available."""
    yield from _use(request.param)


@pytest.fixture(params=["cpu", "triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every backend with kernels."""
    yield from _use(request.param)


@pytest.fixture
def compiled_kernels() -> Iterator[str]:
    """Runs the test on the compiled CPU kernels."""
    yield from _use("cpu")


def _use(name: str) -> Iterator[str]:
    if reason := why_missing(name):
        pytest.skip(reason)
    # Tensors that a test creates are on the device of the backend, including those of its reference.
    with torch.device("cuda" if name in ("triton", "cuda") and ON_GPU else "cpu"), lk.use_backend(name):
        yield name
