"""`lowpass_foreach` against the reference map by map. Other backends than CUDA loop over `lowpass`."""

from collections.abc import Callable

import pytest
import torch
from oracles import assert_close_to_truth, gradients, in_float64, rounding, torch_lowpass
from test_compile import assert_same
from torch import Tensor, randn

import lfcc_kernels as lk
from lfcc_kernels.functional import lowpass_foreach

SCALES = (1, 2, 4)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# The stages of two networks: more maps than one launch processes.
SIZES = [(5, 12, 10), (16, 7, 7), (40, 4, 4), (3, 28, 14)]
LAYOUTS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("NCHW", lambda x: x.contiguous()),
    ("channels_last", lambda x: x.to(memory_format=torch.channels_last)),
    ("cut out", lambda x: torch.nn.functional.pad(x, (1, 2, 0, 1))[:, :, :-1, 1:-2]),
]


def maps(dtype: torch.dtype) -> list[Tensor]:
    return [layout(randn(2, *size).to(dtype)).detach().requires_grad_() for size in SIZES for _, layout in LAYOUTS]


def filters_of(inputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    return [tuple(randn(sum(SCALES), side, dtype=dtype).requires_grad_() for side in x.shape[2:]) for x in inputs]


cuda = pytest.mark.parametrize("kernels", ["cuda"], indirect=True)


def test_every_backend(backend: str) -> None:
    inputs = maps(torch.float32)[:4]
    results, expected = lowpass_foreach(inputs, SCALES), [torch_lowpass(x, SCALES) for x in inputs]
    torch.testing.assert_close(list(results), expected)
    grads, same = (torch.autograd.grad(sum(y.square().sum() for y in ys), inputs) for ys in (results, expected))
    torch.testing.assert_close(grads, same)


@cuda
@pytest.mark.parametrize("filtered", [False, True], ids=["average", "filters"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pyramids_and_gradients(kernels: str, dtype: torch.dtype, filtered: bool) -> None:
    inputs = maps(dtype)
    filters = filters_of(inputs) if filtered else None
    pyramids = lowpass_foreach(inputs, SCALES, filters=filters)
    for n, (x, pyramid) in enumerate(zip(inputs, pyramids, strict=True)):
        learning = [x, *(filters[n] if filters else ())]
        exact = in_float64(*learning)
        reference, truth = torch_lowpass(x, SCALES, *learning[1:]), torch_lowpass(exact[0], SCALES, *exact[1:])
        upstream = torch.randn_like(reference)
        results = [pyramid, *torch.autograd.grad(pyramid, learning, upstream, retain_graph=True)]
        expected = [reference, *gradients(reference, learning, upstream)]
        exact_results = [truth, *gradients(truth, exact, upstream.double())]
        for result, same, exact_result in zip(results, expected, exact_results, strict=True):
            floor = 4 * rounding(result.dtype, exact_result)
            assert_close_to_truth(result, same, exact_result, factor=3, floor=floor)


@cuda
def test_tokens_and_maps(kernels: str) -> None:
    tokens, x = randn(2, 1 + 6 * 5, 8, requires_grad=True), randn(2, 3, 6, 6, requires_grad=True)
    pooled, of_map = lowpass_foreach([tokens, x], (1, 2), grids=[(6, 5), None], prefix_tokens=[1, 0])
    as_map = tokens[:, 1:].unflatten(1, (6, 5)).permute(0, 3, 1, 2)
    torch.testing.assert_close(pooled, torch_lowpass(as_map, (1, 2)))
    torch.testing.assert_close(of_map, torch_lowpass(x, (1, 2)))
    (grad,) = torch.autograd.grad(pooled.sum(), tokens)
    (expected,) = torch.autograd.grad(torch_lowpass(as_map, (1, 2)).sum(), tokens)
    torch.testing.assert_close(grad, expected)


@cuda
def test_frozen_and_unused_maps(kernels: str) -> None:
    x, frozen, unused = randn(2, 3, 8, 8, requires_grad=True), randn(2, 3, 6, 6), randn(2, 3, 5, 5, requires_grad=True)
    pooled = lowpass_foreach([x, frozen, unused], (1, 2))
    (pooled[0].sum() + pooled[1].sum()).backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(torch_lowpass(x, (1, 2)).sum(), x)[0])
    assert unused.grad is None or not unused.grad.any()


@cuda
def test_maps_of_different_types(kernels: str) -> None:
    pooled = lowpass_foreach([randn(2, 3, 6, 6), randn(2, 3, 6, 6).bfloat16()], (1, 2))
    assert [y.dtype for y in pooled] == [torch.float32, torch.bfloat16]


@cuda
def test_second_derivative_names_the_backend_that_has_one(kernels: str) -> None:
    inputs = maps(torch.float32)[:2]
    pooled = lowpass_foreach(inputs, (1, 2))[1]
    upstream = torch.randn_like(pooled, requires_grad=True)
    (grad,) = torch.autograd.grad(pooled, inputs[1], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match=r"use_backend\('eager'\)"):
        grad.square().sum().backward()


@cuda
def test_compiled(kernels: str) -> None:
    inputs = maps(torch.float32)[:3]

    def function(*inputs: Tensor) -> Tensor:
        return torch.cat([y.flatten(1) for y in lowpass_foreach(inputs, (1, 2))], dim=1)

    torch._dynamo.reset()
    assert_same(torch.compile(function, fullgraph=True, backend="aot_eager"), function, inputs)


def test_the_loss_pools_all_stages_in_one_call() -> None:
    if "cuda" not in lk.available_backends():
        pytest.skip("the CUDA kernels are not available")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loss = lk.LFCCLoss((4,) * 3, (6,) * 3).to(device)
    student = [randn(4, 4, 8, 8, device=device, requires_grad=True) for _ in range(3)]
    with lk.use_backend("cuda"):
        pyramids = loss.student_pyramids(student)
        assert all("lfcc_lowpass_foreach_cuda" in _nodes(pyramid) for pyramid in pyramids)


def _nodes(tensor: Tensor) -> str:
    """Names of all autograd nodes of a tensor."""
    names, ahead = [], [tensor.grad_fn]
    while ahead:
        node = ahead.pop()
        names.append(node.name())
        ahead += [following for following, _ in node.next_functions if following is not None]
    return " ".join(names)


def test_lists_of_different_lengths_raise() -> None:
    x = randn(2, 3, 6, 6)
    for maps, options in (([], {}), ([x, x], {"filters": []}), ([x], {"grids": [None, None]})):
        with pytest.raises(ValueError, match=r"expected (at least one map|one entry per map)"):
            lowpass_foreach(maps, (1, 2), **options)
