"""Selection of a backend: context manager, environment, dispatch table, and machines without kernels."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import randn

import lfcc_kernels as lk
from lfcc_kernels.backends import cuda, native, triton
from lfcc_kernels.ops import dispatch

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
FASTEST = "eager" if native.missing else "cpu"


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets the dispatch table: lists of (op, dtype, up_to, backend) by machine; initially empty."""

    def table(**machines: list[tuple]) -> None:
        keys = ("op", "dtype", "up_to", "backend")
        lines = {name: [dict(zip(keys, line, strict=True)) for line in some] for name, some in machines.items()}
        monkeypatch.setattr(dispatch, "table", lambda: lines)
        dispatch._cached_lines.cache_clear()

    table()
    yield table
    dispatch._cached_lines.cache_clear()


def select(device: torch.device, dtype: torch.dtype, op: str = "lowpass", size: int = 1000) -> str:
    return dispatch.select(op, device, dtype, size)


def selected() -> str:
    return select(CPU, torch.float32)


def test_blocks_nest_and_end() -> None:
    with lk.use_backend("eager"):
        with lk.use_backend("auto"):
            assert selected() == FASTEST
            with lk.use_backend("eager"):
                assert selected() == "eager"
        assert selected() == "eager"
    assert selected() == FASTEST
    with pytest.raises(KeyError), lk.use_backend("eager"):
        raise KeyError
    assert selected() == FASTEST


@pytest.mark.parametrize("name", ["cuDNN", "", "EAGER", None])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ValueError) as caught, lk.use_backend(name):
        pass
    for fragment in (repr(name), "not available", "auto", *lk.available_backends()):
        assert fragment in str(caught.value)
    assert selected() == FASTEST


def test_choice_belongs_to_its_thread() -> None:
    seen = []
    with lk.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(selected()))
        thread.start()
        thread.join()
    assert seen == [FASTEST]


def test_backends_differ_in_what_they_run(kernels: str) -> None:
    """An op with kernels records one autograd node, that of its overload; eager records one per step."""
    x = randn(2, 3, 7, 7, requires_grad=True)
    assert f"lfcc_lowpass_{'default' if kernels == 'cpu' else kernels}" in lk.lowpass(x).grad_fn.name()
    with lk.use_backend("eager"):
        assert "lfcc" not in lk.lowpass(x).grad_fn.name()


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", "the library is not there; run pip install .")
    monkeypatch.setattr(triton, "missing", lambda: "no NVIDIA GPU")
    monkeypatch.setattr(cuda, "missing", lambda: "no CUDA kernels")
    assert lk.available_backends() == ("eager",)
    assert selected() == "eager" and select(CUDA, torch.float32) == "eager"
    reasons = {"cpu": "the library .* pip install .", "triton": "no NVIDIA GPU", "cuda": "no CUDA kernels"}
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=rf"'{name}' is not available \({reason}\); available are auto, eager"):
            lk.use_backend(name).__enter__()


@pytest.fixture
def with_all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the compiled library and a GPU, on which all backends are available."""
    monkeypatch.setattr(native, "missing", "")
    monkeypatch.setattr(triton, "missing", lambda: "")
    monkeypatch.setattr(triton, "DEVICE", "cuda")
    monkeypatch.setattr(cuda, "missing", lambda: "")
    monkeypatch.setattr(cuda, "device", lambda: "cuda")


@pytest.mark.parametrize(
    ("device", "dtypes", "expected", "without_triton"),
    [
        (CPU, (torch.float32, torch.float64, torch.bfloat16), "cpu", "cpu"),
        (CUDA, (torch.float32, torch.bfloat16, torch.float16), "triton", "cuda"),
        (torch.device("cuda", 1), (torch.float32,), "triton", "cuda"),
        (CUDA, (torch.float64,), "eager", "eager"),
        (META, (torch.float32,), "eager", "eager"),
    ],
    ids=str,
)
def test_order_without_measurements(
    with_all_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    expected: str,
    without_triton: str,
) -> None:
    with lk.use_backend("auto"):
        assert lk.available_backends() == ("eager", "cpu", "triton", "cuda")
        assert {select(device, dtype) for dtype in dtypes} == {expected}
        monkeypatch.setattr(triton, "missing", lambda: "Triton is not installed")
        assert lk.available_backends() == ("eager", "cpu", "cuda")
        assert {select(device, dtype) for dtype in dtypes} == {without_triton}


def test_a_line_applies_to_its_op_dtype_and_sizes_up_to_its_bound(
    with_all_kernels: None, measured: Callable[..., None]
) -> None:
    measured(
        cpu=[
            ("info_nce", "float32", None, "eager"),
            ("lowpass", "float32", 10, "eager"),
            ("lowpass", "float32", 200, "cpu"),
            ("lowpass", "float32", None, "eager"),
        ]
    )
    with lk.use_backend("auto"):
        sizes = (0, 10, 11, 200, 201, 10**12)
        assert [select(CPU, torch.float32, size=size) for size in sizes] == ["eager"] * 2 + ["cpu"] * 2 + ["eager"] * 2
        assert select(CPU, torch.float32, "info_nce") == "eager"
        assert select(CPU, torch.bfloat16) == select(CPU, torch.bfloat16, "info_nce") == "cpu"
        assert select(CUDA, torch.float32) == "triton"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "triton"), ((8, 6), "cuda"), ((8, 9), "cuda"), ((9, 0), "eager"), ((10, 0), "eager"), ((12, 1), "cuda")],
    ids=str,
)
def test_a_gpu_uses_the_lines_of_the_nearest_older_one(
    with_all_kernels: None,
    measured: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    expected: str,
) -> None:
    """sm_100 has no line for the op; nothing older than sm_80 was measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    lines = {name: [("lowpass", "bfloat16", None, name)] for name in ("cuda", "eager")}
    measured(
        sm_120=lines["cuda"], sm_86=lines["cuda"], cpu=lines["eager"], sm_90=lines["eager"],
        sm_100=[("info_nce", "bfloat16", None, "cuda")],
    )  # fmt: skip
    with lk.use_backend("auto"):
        assert select(CUDA, torch.bfloat16) == expected
        assert select(CUDA, torch.float64) == "eager"


@pytest.mark.parametrize(
    ("missing", "expected"), [((), "cuda"), (("cuda",), "triton"), (("cuda", "triton"), "eager")], ids=str
)
def test_fixed_order_if_the_measured_backend_is_not_available(
    with_all_kernels: None,
    measured: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    missing: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    measured(sm_90=[("lowpass", "float32", None, "cuda")])
    for name in missing:
        monkeypatch.setattr({"cuda": cuda, "triton": triton}[name], "missing", lambda: "not built")
    with lk.use_backend("auto"):
        assert select(CUDA, torch.float32) == expected


def test_a_named_backend_overrides_the_table(measured: Callable[..., None], kernels: str) -> None:
    measured(cpu=[("lowpass", "float32", None, "eager")])
    assert selected() == kernels
    with lk.use_backend("auto"):
        assert selected() == "eager"


@pytest.mark.skipif(native.missing != "", reason="the compiled kernels are not built")
@pytest.mark.parametrize(
    ("call", "small", "large"),
    [
        pytest.param(lk.lowpass, [(1, 5, 4, 4)], [(2, 3, 4, 4)], id="lowpass, 80 and 96 elements"),
        pytest.param(lk.info_nce, [(9, 3), (9, 3)], [(7, 3), (13, 3)], id="info_nce, 81 and 91 pairs of rows"),
    ],
)
def test_the_size_of_a_call(measured: Callable[..., None], call: Callable, small: list, large: list) -> None:
    measured(cpu=[(op, "float32", bound, name) for op in ("lowpass", "info_nce")
                  for bound, name in ((90, "eager"), (None, "cpu"))])  # fmt: skip
    with lk.use_backend("auto"):
        results = [call(*(randn(shape, requires_grad=True) for shape in shapes)) for shapes in (small, large)]
    assert ["lfcc" in result.grad_fn.name() for result in results] == [False, True]


UP_TO_SIX = [("lowpass", "float32", 6 * 105, "eager"), ("lowpass", "float32", None, "cpu")]  # maps (3, 5, 7)


def test_either_side_of_a_bound_is_compiled_once(measured: Callable[..., None]) -> None:
    measured(cpu=UP_TO_SIX)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lk.lowpass, fullgraph=True, backend=graphs, dynamic=True)
    with lk.use_backend("auto"):
        for batch in (4, 6, 2, 8, 9, 20):
            x = randn(batch, 3, 5, 7)
            torch.testing.assert_close(compiled(x), lk.lowpass(x))
    assert graphs.frame_count == 2


@pytest.mark.skipif(native.missing != "", reason="the compiled kernels are not built")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_graph_is_for_all_sizes(measured: Callable[..., None], strict: bool) -> None:
    """It has the backend of the largest size, whatever the size of the example."""
    measured(cpu=UP_TO_SIX)
    batch = torch.export.Dim("batch", min=2, max=512)
    with lk.use_backend("auto"), torch.no_grad():
        program = torch.export.export(
            lk.LowPassPyramid(), (randn(4, 3, 5, 7),), dynamic_shapes=({0: batch},), strict=strict
        )
        assert "lfcc.lowpass.default" in [str(node.target) for node in program.graph.nodes]
        for size in (2, 20):
            x = randn(size, 3, 5, 7)
            torch.testing.assert_close(program.module()(x), lk.lowpass(x))


def test_a_named_backend_runs_every_dtype_on_its_device_only(with_all_kernels: None) -> None:
    homes = {"cpu": CPU, "triton": CUDA, "cuda": CUDA}
    for name, home in homes.items():
        with lk.use_backend(name):
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                assert select(home, dtype) == name
            for other in {CPU, CUDA, META} - {home}:
                message = rf"'{name}' was selected but .* {other.type}; move them with \.to\('{home.type}'\), or select"
                with pytest.raises(ValueError, match=message):
                    select(other, torch.float32)
    with lk.use_backend("eager"):
        assert {select(device, torch.float32) for device in (CPU, CUDA, META)} == {"eager"}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code on the package under test in a new process."""
    command, root = [sys.executable, "-c", code], Path(lk.__file__).parents[1]
    return subprocess.run(command, env=os.environ | environment, cwd=root, capture_output=True, text=True)


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
LOWPASS = "import torch, lfcc_kernels as lk; lk.lowpass(torch.ones(1, 1, 4, 4))"


def test_environment_sets_the_default() -> None:
    code = f"{LOWPASS}; from lfcc_kernels.ops import dispatch; print(dispatch._selected.name)"
    assert python(code, LFCC_BACKEND="eager").stdout.strip() == "eager"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fast", "available are auto, eager"),
        pytest.param("triton", "no NVIDIA GPU.*TRITON_INTERPRET=1|Triton is not installed", marks=NO_GPU),
        pytest.param("cuda", "no NVIDIA GPU|LFCC_BUILD_CUDA=1|_C is missing", marks=NO_GPU),
    ],
)
def test_backend_of_the_environment_that_is_not_available(name: str, reason: str) -> None:
    run = python(LOWPASS, LFCC_BACKEND=name, TRITON_INTERPRET="0")
    assert run.returncode != 0 and re.search(f"ValueError: backend '{name}' is not available.*({reason})", run.stderr)


def test_triton_raises_for_tensors_on_the_cpu() -> None:
    """Without the interpreter, on a simulated machine with a GPU."""
    ready = "from lfcc_kernels.backends import triton; triton.missing = lambda: ''"
    run = python(f"{ready}; {LOWPASS}", LFCC_BACKEND="triton", TRITON_INTERPRET="0")
    assert run.returncode != 0
    assert "ValueError: backend 'triton' was selected but the tensors are on cpu" in run.stderr
    assert ".to('cuda')" in run.stderr and "use_backend('auto')" in run.stderr
