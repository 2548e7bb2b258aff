"""Which backend serves: the context manager, the environment, and a machine without kernels."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import randn

import lfcc_kernels as lk
from lfcc_kernels.backends import native
from lfcc_kernels.ops.dispatch import select

CPU = torch.device("cpu")
FASTEST = "eager" if native.missing else "cpu"


def served() -> str:
    return select(CPU, torch.float32)


def test_auto_is_the_default() -> None:
    assert served() == FASTEST
    assert lk.available_backends()[0] == "eager"


def test_blocks_nest_and_end() -> None:
    with lk.use_backend("eager"):
        with lk.use_backend("auto"):
            assert served() == FASTEST
            with lk.use_backend("eager"):
                assert served() == "eager"
        assert served() == "eager"
    assert served() == FASTEST


def test_a_block_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), lk.use_backend("eager"):
        raise KeyError
    assert served() == FASTEST


@pytest.mark.parametrize("name", ["cuDNN", "", "EAGER", None])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ValueError) as caught, lk.use_backend(name):
        pass
    for fragment in (repr(name), "not available", "auto", *lk.available_backends()):
        assert fragment in str(caught.value)
    assert served() == FASTEST


def test_choice_belongs_to_its_thread() -> None:
    seen = []
    with lk.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(served()))
        thread.start()
        thread.join()
    assert seen == [FASTEST]


def test_backends_differ_in_what_they_run(kernels: None) -> None:
    """The compiled op leaves one node in the graph, eager one for each step."""
    x = randn(2, 3, 7, 7, requires_grad=True)
    assert "lfcc_lowpass" in lk.lowpass(x).grad_fn.name()
    with lk.use_backend("eager"):
        assert "lfcc" not in lk.lowpass(x).grad_fn.name()


def test_kernels_asked_for_by_name_refuse_other_devices(kernels: None) -> None:
    with pytest.raises(ValueError, match=r"'cpu'.*meta.*use_backend\('auto'\)"):
        lk.lowpass(randn(2, 3, 7, 7).to("meta"))


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", "the library is not there; run pip install .")
    assert lk.available_backends() == ("eager",)
    assert served() == "eager"
    with pytest.raises(ValueError, match=r"'cpu' is not available \(the library .* pip install"):
        lk.use_backend("cpu").__enter__()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code on the package under test in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=Path(lk.__file__).parents[1],
        capture_output=True,
        text=True,
    )


SERVED = "import torch; from lfcc_kernels.ops.dispatch import select; print(select(torch.device('cpu'), torch.float32))"
LOWPASS = "import torch, lfcc_kernels as lk; lk.lowpass(torch.ones(1, 1, 4, 4))"


def test_environment_sets_the_default() -> None:
    assert python(SERVED, LFCC_BACKEND="eager").stdout.strip() == "eager"


def test_unknown_name_in_the_environment_is_told_at_the_first_call() -> None:
    run = python(LOWPASS, LFCC_BACKEND="fast")
    assert run.returncode != 0
    assert "ValueError" in run.stderr and "'fast'" in run.stderr and "eager" in run.stderr


def test_core_imports_with_torch_alone() -> None:
    others = (
        "timm",
        "torchvision",
        "tensorboard",
        "torchmetrics",
        "yaml",
        "tqdm",
        "matplotlib",
        "scipy",
        "sklearn",
    )
    blocked = f"import sys; sys.modules.update(dict.fromkeys({others!r}))"
    run = python(f"{blocked}; {LOWPASS}; lk.LFCCLoss([1], [1])")
    assert run.returncode == 0, run.stderr
