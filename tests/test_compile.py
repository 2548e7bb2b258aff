"""Every op compiles without graph breaks, with the same results."""

import shutil
from collections.abc import Callable

import pytest
import torch
from op_cases import FUNCTIONS, functions
from torch import Tensor, randn

import lfcc_kernels as lk

pytestmark = pytest.mark.slow_on("eager", "triton")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def assert_same(compiled: Callable[..., Tensor], function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    expected, result = function(*inputs), compiled(*inputs)
    torch.testing.assert_close(result, expected)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(result, inputs, upstream)
    for grad, same in zip(grads, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(grad, same)
        assert grad.stride() == same.stride()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph(backend: str, name: str) -> None:
    function, inputs = functions(torch.float32)[name]
    assert_same(torch.compile(function, fullgraph=True, backend="aot_eager"), function, inputs)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["filters", "symmetric"])
def test_inductor(compiled_kernels: str, name: str) -> None:
    function, inputs = functions(torch.float32)[name]
    assert_same(torch.compile(function, fullgraph=True), function, inputs)


@pytest.mark.parametrize("name", ["average", "filters", "average, tokens", "student_to_teacher", "symmetric"])
def test_one_graph_for_every_batch_size(backend: str, name: str) -> None:
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function, _ = functions(torch.float32)[name]
    compiled = torch.compile(function, fullgraph=True, backend=graphs, dynamic=True)
    for batch in (4, 6, 9):
        assert_same(compiled, function, functions(torch.float32, batch)[name][1])
    assert graphs.frame_count == 1


@pytest.mark.parametrize("filter", ["average", "learnable", "gaussian", "dct"])
def test_compiled_pyramid_on_maps_of_other_sizes(compiled_kernels: str, filter: str) -> None:
    pyramid = lk.LowPassPyramid((1, 2), filter)
    compiled = torch.compile(pyramid, fullgraph=True, backend="aot_eager")
    for size in (7, 9, 12, 7):
        x = randn(2, 3, size, size + 1)
        torch.testing.assert_close(compiled(x), pyramid(x))


def test_no_gradient(backend: str) -> None:
    x = randn(2, 3, 7, 7)
    compiled = torch.compile(lk.lowpass, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), lk.lowpass(x))


def test_backend_may_change_after_compilation(kernels: str) -> None:
    """A graph compiled for one backend is not run for another."""
    ran = []

    def recorder(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        ops = [str(node.target) for node in graph.graph.nodes if "lfcc" in str(node.target)]
        return lambda *inputs: ran.append(ops) or graph(*inputs)

    compiled, x = torch.compile(lk.lowpass, fullgraph=True, backend=recorder), randn(2, 3, 7, 7)
    for name in (kernels, "eager", kernels, "eager"):
        with lk.use_backend(name):
            compiled(x)
    overload = f"lfcc.lowpass.{'default' if kernels == 'cpu' else kernels}"
    assert ran == [[overload], [], [overload], []]


def test_invalid_temperature_raises_at_run_time(kernels: str) -> None:
    """The value of a tensor is not known during compilation."""
    student, teacher = randn(5, 8, requires_grad=True), randn(5, 8)
    compiled = torch.compile(lk.info_nce, fullgraph=True, backend="aot_eager")
    good, bad = torch.tensor(0.1, device="cpu"), torch.tensor(-1.0, device="cpu")  # read by the host, rows wherever
    torch.testing.assert_close(
        compiled(student, teacher, temperature=good), lk.info_nce(student, teacher, temperature=good)
    )
    with pytest.raises((RuntimeError, ValueError), match="temperature is -1"):
        compiled(student, teacher, temperature=bad)
