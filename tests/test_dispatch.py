"""Which backend serves: the context manager, the environment, and a machine without kernels."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, randn

import lfcc_kernels as lk
from lfcc_kernels import info
from lfcc_kernels.backends import cuda, native, triton
from lfcc_kernels.ops import dispatch

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
FASTEST = "eager" if native.missing else "cpu"


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets what was measured: lists of lines (op, dtype, up_to, backend) by machine. At first it is nothing."""

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


def test_backends_differ_in_what_they_run(kernels: str) -> None:
    """An op with kernels leaves one node in the graph, that of its overload, eager one for each step."""
    x = randn(2, 3, 7, 7, requires_grad=True)
    assert f"lfcc_lowpass_{'default' if kernels == 'cpu' else kernels}" in lk.lowpass(x).grad_fn.name()
    with lk.use_backend("eager"):
        assert "lfcc" not in lk.lowpass(x).grad_fn.name()


def test_kernels_asked_for_by_name_refuse_other_devices(kernels: str) -> None:
    with pytest.raises(ValueError, match=rf"'{kernels}'.*meta.*use_backend\('auto'\)"):
        lk.lowpass(randn(2, 3, 7, 7).to("meta"))


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", "the library is not there; run pip install .")
    monkeypatch.setattr(triton, "missing", lambda: "no NVIDIA GPU")
    monkeypatch.setattr(cuda, "missing", lambda: "no CUDA kernels")
    assert lk.available_backends() == ("eager",)
    assert served() == "eager" and select(CUDA, torch.float32) == "eager"
    with pytest.raises(ValueError, match=r"'cpu' is not available \(the library .* pip install"):
        lk.use_backend("cpu").__enter__()
    with pytest.raises(ValueError, match=r"'triton' is not available \(no NVIDIA GPU\); available are auto, eager"):
        lk.use_backend("triton").__enter__()
    with pytest.raises(ValueError, match=r"'cuda' is not available \(no CUDA kernels\); available are auto, eager"):
        lk.use_backend("cuda").__enter__()


@pytest.fixture
def with_all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the compiled library and a GPU that Triton and CUDA's kernels serve."""
    monkeypatch.setattr(native, "missing", "")
    monkeypatch.setattr(triton, "missing", lambda: "")
    monkeypatch.setattr(triton, "DEVICE", "cuda")
    monkeypatch.setattr(cuda, "missing", lambda: "")
    monkeypatch.setattr(cuda, "device", lambda: "cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        (CPU, torch.float32, "cpu"),
        (CPU, torch.float64, "cpu"),
        (CPU, torch.bfloat16, "cpu"),
        (CUDA, torch.float32, "triton"),
        (CUDA, torch.bfloat16, "triton"),
        (CUDA, torch.float16, "triton"),
        (torch.device("cuda", 1), torch.float32, "triton"),
        (CUDA, torch.float64, "eager"),
        (META, torch.float32, "eager"),
    ],
    ids=str,
)
def test_auto_takes_the_fastest(
    with_all_kernels: None, device: torch.device, dtype: torch.dtype, expected: str
) -> None:
    with lk.use_backend("auto"):
        assert select(device, dtype) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_auto_takes_cuda_kernels_where_triton_is_missing(
    with_all_kernels: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(triton, "missing", lambda: "Triton is not installed")
    with lk.use_backend("auto"):
        assert select(CUDA, dtype) == ("eager" if dtype == torch.float64 else "cuda")


def test_a_line_holds_for_its_op_its_dtype_and_sizes_up_to_its_bound(
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
def test_a_gpu_goes_by_the_nearest_older_one(
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
def test_a_measured_backend_that_cannot_serve_leaves_it_to_the_fixed_order(
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
    assert served() == kernels
    with lk.use_backend("auto"):
        assert served() == "eager"


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


class LowPass(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return lk.lowpass(x)


@pytest.mark.skipif(native.missing != "", reason="the compiled kernels are not built")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_graph_is_for_all_sizes(measured: Callable[..., None], strict: bool) -> None:
    """It holds the backend of the largest, whatever the size of the example."""
    measured(cpu=UP_TO_SIX)
    batch = torch.export.Dim("batch", min=2, max=512)
    with lk.use_backend("auto"), torch.no_grad():
        program = torch.export.export(LowPass(), (randn(4, 3, 5, 7),), dynamic_shapes=({0: batch},), strict=strict)
        assert "lfcc.lowpass.default" in [str(node.target) for node in program.graph.nodes]
        for size in (2, 20):
            x = randn(size, 3, 5, 7)
            torch.testing.assert_close(program.module()(x), lk.lowpass(x))


def test_info_names_the_records_behind_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LFCC_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "table", lambda: {"cpu": [{"record": "a.json"}] * 2, "sm_90": [{"record": "b.json"}]})
    assert "auto: by table (on cpu a.json; on sm_90 b.json), else the first of cpu" in info.report()
    monkeypatch.setattr(dispatch, "table", lambda: {"cpu": []})
    assert "auto: the first of cpu" in info.report()


def test_available_are_those_that_lack_nothing(with_all_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lk.available_backends() == ("eager", "cpu", "triton", "cuda")
    monkeypatch.setattr(triton, "missing", lambda: "no NVIDIA GPU")
    assert lk.available_backends() == ("eager", "cpu", "cuda")
    monkeypatch.setattr(cuda, "missing", lambda: "no NVIDIA GPU")
    assert lk.available_backends() == ("eager", "cpu")
    monkeypatch.setattr(native, "missing", "no library")
    monkeypatch.setattr(triton, "missing", lambda: "")
    assert lk.available_backends() == ("eager", "triton")


def test_a_selected_backend_takes_every_dtype_on_its_device_alone(with_all_kernels: None) -> None:
    homes = {"cpu": CPU, "triton": CUDA, "cuda": CUDA}
    for name, home in homes.items():
        with lk.use_backend(name):
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                assert select(home, dtype) == name
            for other in {CPU, CUDA, META} - {home}:
                message = rf"'{name}'.* on {other.type}; move .* \.to\('{home.type}'\), or select use_backend\('auto'\)"
                with pytest.raises(ValueError, match=message):
                    select(other, torch.float32)
    with lk.use_backend("eager"):
        assert {select(device, torch.float32) for device in (CPU, CUDA, META)} == {"eager"}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code on the package under test in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=Path(lk.__file__).parents[1],
        capture_output=True,
        text=True,
    )


SERVED = (
    "import torch; from lfcc_kernels.ops.dispatch import select; "
    "print(select('lowpass', torch.device('cpu'), torch.float32, 1))"
)
LOWPASS = "import torch, lfcc_kernels as lk; lk.lowpass(torch.ones(1, 1, 4, 4))"


def test_environment_sets_the_default() -> None:
    assert python(SERVED, LFCC_BACKEND="eager").stdout.strip() == "eager"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu_says_how_to_interpret() -> None:
    run = python(LOWPASS, LFCC_BACKEND="triton", TRITON_INTERPRET="0")
    assert run.returncode != 0 and "'triton' is not available" in run.stderr
    if "Triton is not installed" not in run.stderr:
        assert "no NVIDIA GPU" in run.stderr and "TRITON_INTERPRET=1" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_says_what_is_missing() -> None:
    run = python(LOWPASS, LFCC_BACKEND="cuda")
    assert run.returncode != 0 and "'cuda' is not available" in run.stderr
    assert "no NVIDIA GPU" in run.stderr or "LFCC_BUILD_CUDA=1" in run.stderr or "_C is missing" in run.stderr


def test_triton_refuses_tensors_on_the_cpu() -> None:
    """Unless it interprets; as if there were a GPU."""
    ready = "from lfcc_kernels.backends import triton; triton.missing = lambda: ''"
    run = python(f"{ready}; {LOWPASS}", LFCC_BACKEND="triton", TRITON_INTERPRET="0")
    assert run.returncode != 0
    assert "ValueError: backend 'triton' was selected but the tensors are on cpu" in run.stderr
    assert ".to('cuda')" in run.stderr and "use_backend('auto')" in run.stderr


def test_kernels_of_triton_are_imported_with_their_first_call() -> None:
    """Their modules need Triton, which a user of the CPU may not have."""
    loaded = "print('lfcc_kernels.backends.triton.runtime' in sys.modules)"
    run = python(f"import sys; {LOWPASS}; lk.available_backends(); {loaded}", LFCC_BACKEND="auto")
    assert run.stdout.strip() == "False", run.stderr


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
        "triton",
    )
    blocked = f"import sys; sys.modules.update(dict.fromkeys({others!r}))"
    run = python(f"{blocked}; {LOWPASS}; lk.LFCCLoss([1], [1])")
    assert run.returncode == 0, run.stderr
