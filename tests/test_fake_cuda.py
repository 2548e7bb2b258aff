"""CUDA without a GPU: fake tensors, which have shape, dtype, layout and device but no values.

The backward pass is called node by node, because the autograd engine queries the driver for the device even of a fake
gradient. Tests on a GPU run it as a whole.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_cases import CALLS, FUNCTIONS, functions, skip_unless_implemented
from torch import Tensor, randn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import lfcc_kernels as lk
from lfcc_kernels import filters
from lfcc_kernels.backends import cuda, triton
from lfcc_kernels.ops.registration import op

LOWPASS, INFO_NCE, GROUP = (f"lfcc.{name}.triton" for name in ("lowpass", "info_nce", "info_nce_foreach"))
ONE_PASS = "lfcc.info_nce_one_pass.triton"


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Simulates a GPU with all backends; tensors of the test are fake and by default on it."""
    monkeypatch.setattr(triton, "missing", lambda: "")
    monkeypatch.setattr(triton, "DEVICE", "cuda")
    monkeypatch.setattr(cuda, "missing", lambda: "")
    monkeypatch.setattr(cuda, "device", lambda: "cuda")
    monkeypatch.setattr(filters, "_RESAMPLING", {})  # fake tensors must not be cached
    torch._dynamo.reset()
    with lk.use_backend("auto"), FakeTensorMode() as mode, torch.device("cuda"):
        yield mode


def metadata(results: Any) -> list[tuple]:
    return [(tuple(x.shape), x.dtype, x.stride()) for x in tree_leaves(results)]


@pytest.mark.parametrize("host_temperature", [False, True], ids=["temperature on the GPU", "on the host"])
@pytest.mark.parametrize("call", CALLS)
def test_ops_have_the_results_of_their_kernels(kernels: str, call: str, host_temperature: bool) -> None:
    """Shapes, dtypes and layouts are compared with the results of the kernels on the device of the tests."""
    name, arguments = CALLS[call]
    skip_unless_implemented(name, kernels)
    if host_temperature and "info_nce" not in name:
        pytest.skip("has no temperature")
    real = tree_map_only(Tensor, Tensor.detach, arguments())
    expected = op(name, kernels)(*real)
    with FakeTensorMode() as mode:

        def on_cuda(x: Tensor) -> Tensor:
            fake = mode.from_tensor(x)
            return fake.to("cpu") if host_temperature and x.dim() == 0 else fake.to("cuda")

        results = op(name, kernels)(*tree_map_only(Tensor, on_cuda, real))
    assert metadata(results) == metadata(expected)
    devices = [x.device.type for x in tree_leaves(results)]
    if host_temperature and name == "info_nce_grad":  # the second is the gradient of the temperature
        assert devices == ["cuda", "cpu"]
    else:
        assert set(devices) == {"cuda"}


@pytest.mark.parametrize("choice", ["auto", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", ["student_to_teacher", "symmetric"])
def test_gradients_are_those_of_the_inputs(
    fake_cuda: FakeTensorMode, direction: str, dtype: torch.dtype, choice: str
) -> None:
    overload = {"auto": "_triton", "cuda": "_cuda"}[choice]
    x = randn(4, 3, 14, 14, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    student, teacher = (randn(rows, 8, dtype=dtype, requires_grad=True) for rows in (5, 9))
    temperature = torch.tensor(0.1, requires_grad=True)
    with lk.use_backend(choice):
        loss = lk.info_nce(student, teacher, temperature=temperature, direction=direction, positive_offset=2)
        pyramid = lk.lowpass(x)
    for result, inputs in ((pyramid, [x]), (loss, [student, teacher, temperature])):
        assert overload in result.grad_fn.name() and result.is_cuda
        others = 0 if result is not loss else 2 if direction == "symmetric" else 3  # results without a gradient
        grads = result.grad_fn.apply(torch.empty_like(result), *[None] * others)
        assert metadata(grads[: len(inputs)]) == metadata(inputs)
        assert all(grad.device == given.device for grad, given in zip(grads, inputs, strict=False))
    assert loss.dtype == torch.float32


def test_auto_leaves_float64_to_torch(fake_cuda: FakeTensorMode) -> None:
    result = lk.lowpass(randn(4, 3, 14, 14, dtype=torch.float64, requires_grad=True))
    assert result.is_cuda and "lfcc" not in result.grad_fn.name()


def test_without_a_graph_to_record(fake_cuda: FakeTensorMode) -> None:
    with torch.no_grad():
        results = lk.lowpass(randn(4, 3, 7, 7)), lk.info_nce(randn(5, 8), randn(5, 8))
    assert metadata(results) == [((4, 21, 3), torch.float32, (63, 3, 1)), ((), torch.float32, ())]
    assert all(x.is_cuda for x in results)


def ops_of(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if str(node.target).startswith("lfcc.")]


def compiled_ops(function: Callable[..., Any], inputs: list[Any], of_any_batch: list[Tensor]) -> list[str]:
    """The ops of a full graph of the function, for any batch size of the inputs in `of_any_batch`."""
    for x in of_any_batch:
        torch._dynamo.mark_dynamic(x, 0)
    graphs = []
    compiled = torch.compile(function, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    result = compiled(*inputs)
    assert result.is_cuda and result.requires_grad and len(graphs) == 1
    return ops_of(graphs[0].graph)


@pytest.mark.parametrize("batch", ["one batch", "any batch"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph(fake_cuda: FakeTensorMode, name: str, batch: str) -> None:
    if batch == "any batch" and "ids" in name:
        pytest.skip("the ids are of one batch")
    function, inputs = functions(torch.float32)[name]
    is_lowpass = name.startswith(("average", "filters"))
    batched = [] if batch == "one batch" else inputs[:1] if is_lowpass else inputs[:2]
    expected = LOWPASS if is_lowpass else INFO_NCE if "symmetric" in name else ONE_PASS
    assert compiled_ops(function, inputs, batched) == [expected]


def lfcc_loss(**options: Any) -> tuple[lk.LFCCLoss, list[Any]]:
    loss = lk.LFCCLoss([3, 4], [5, 6], **options)
    student = [randn(4, 3, 14, 14, requires_grad=True), randn(4, 4, 7, 7, requires_grad=True)]
    teacher = [randn(4, 5, 14, 14), randn(4, 6, 7, 7)]
    loss(student, teacher)  # fills the cache of the filter banks, which a trace treats as constants
    return loss, [student, teacher]


@pytest.mark.parametrize("batch", ["one batch", "any batch"])
@pytest.mark.parametrize(
    ("direction", "contrasts"),
    [("student_to_teacher", [GROUP]), ("teacher_to_student", 6 * [INFO_NCE]), ("symmetric", 6 * [INFO_NCE])],
)
def test_one_graph_of_the_whole_loss(
    fake_cuda: FakeTensorMode, direction: str, contrasts: list[str], batch: str
) -> None:
    loss, inputs = lfcc_loss(direction=direction)
    batched = tree_leaves(inputs) if batch == "any batch" else []
    assert compiled_ops(loss, inputs, batched) == 4 * [LOWPASS] + contrasts


@pytest.mark.parametrize("what", ["lowpass", "info_nce", "loss"])
def test_compiled_down_to_operators_without_gradient(fake_cuda: FakeTensorMode, what: str) -> None:
    loss, inputs = lfcc_loss()
    rows = [randn(5, 8), randn(5, 8)]
    function, inputs = {
        "lowpass": (lk.lowpass, inputs[1][:1]),
        "info_nce": (lk.info_nce, rows),
        "loss": (loss, inputs),
    }[what]
    with torch.no_grad():
        result = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
        assert result.is_cuda and metadata(result) == metadata(function(*inputs))


class Call(torch.nn.Module):
    """A function as a module, as export requires."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


@pytest.mark.parametrize("what", [LOWPASS, INFO_NCE])
def test_export_for_every_batch(fake_cuda: FakeTensorMode, what: str) -> None:
    batch = torch.export.Dim("batch", min=2, max=512)
    function, inputs = {
        LOWPASS: (lk.lowpass, (randn(4, 3, 7, 7),)),
        INFO_NCE: (lambda *rows: lk.info_nce(*rows, reduction="none"), (randn(4, 8), randn(4, 8))),
    }[what]
    with torch.no_grad():
        program = torch.export.export(Call(function), inputs, dynamic_shapes=[tuple({0: batch} for _ in inputs)])
    assert ops_of(program.graph) == [what]
    (result,) = next(iter(reversed(program.graph.nodes))).args[0]
    assert result.meta["val"].is_cuda and isinstance(result.meta["val"].shape[0], torch.SymInt)
