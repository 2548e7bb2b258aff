"""The ops as torch sees them: schemas, fakes, autograd formulas, and the error of double backward."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import CALLS, FUNCTIONS, functions, skip_unless_implemented

import lfcc_kernels as lk
from lfcc_kernels.backends import native
from lfcc_kernels.backends.schemas import BACKENDS, SCHEMAS
from lfcc_kernels.ops.registration import op

ON_ALL_BACKENDS = [name for name, backends in BACKENDS.items() if "cpu" in backends]


def test_kernels_are_built_if_there_is_a_compiler() -> None:
    """A run without kernels skips most tests, so it must not pass on a machine with a compiler."""
    if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        assert "cpu" in lk.available_backends(), native.missing


@pytest.mark.parametrize("name", ON_ALL_BACKENDS)
def test_compiled_schemas_are_those_in_python(compiled_kernels: str, name: str) -> None:
    assert str(op(name, "cpu")._schema) == str(torch._C.parse_schema(f"lfcc::{SCHEMAS[name]}"))


@pytest.mark.parametrize("overload", ["triton", "cuda"])
@pytest.mark.parametrize("name", ON_ALL_BACKENDS)
def test_overloads_differ_in_their_name_only(name: str, overload: str) -> None:
    compiled, other = (str(op(name, backend)._schema) for backend in ("cpu", overload))
    assert other == compiled.replace("(", f".{overload}(", 1)


def test_calls_name_every_op() -> None:
    assert {name for name, _ in CALLS.values()} == set(SCHEMAS)


@pytest.mark.parametrize(("name", "arguments"), CALLS.values(), ids=CALLS)
def test_opcheck(kernels: str, name: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
    skip_unless_implemented(name, kernels)
    torch.library.opcheck(op(name, kernels), arguments())


@pytest.mark.slow_on("eager")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(backend: str, name: str) -> None:
    """Every entry of the Jacobian; for Triton, whose interpreter is slow, its products with random vectors."""
    function, inputs = functions()[name]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=backend == "triton")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivative_on_eager(name: str) -> None:
    function, inputs = functions()[name]
    with lk.use_backend("eager"):
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivative_on_kernels_names_eager(kernels: str, name: str) -> None:
    """For each input on its own, including those in which the op is linear."""
    function, inputs = functions()[name]
    output = function(*inputs)
    upstream = torch.randn_like(output, requires_grad=True)
    for x in inputs:
        (grad,) = torch.autograd.grad(output, x, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match=r"use_backend\('eager'\)"):
            grad.square().sum().backward(retain_graph=True)


@pytest.mark.slow_on("eager")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_backward_twice(backend: str, name: str) -> None:
    function, inputs = functions(torch.float32)[name]
    output = function(*inputs)
    upstream = torch.randn_like(output)
    first = torch.autograd.grad(output, inputs, upstream, retain_graph=True)
    kept = [grad.clone() for grad in first]
    torch.autograd.grad(output, inputs, 2 * upstream, retain_graph=True)
    again = torch.autograd.grad(output, inputs, upstream)
    for one, other, before in zip(first, again, kept, strict=True):
        assert torch.equal(one, other) and torch.equal(one, before)


@pytest.mark.slow_on("eager")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_upstream_that_is_expanded_or_strided(backend: str, name: str) -> None:
    function, inputs = functions()[name]
    output = function(*inputs)
    strided = torch.randn((*output.shape, 2), dtype=output.dtype)[..., 0]
    for upstream in (output.new_ones(()).expand_as(output), strided):
        expected = torch.autograd.grad(output, inputs, upstream.clone().contiguous(), retain_graph=True)
        results = torch.autograd.grad(output, inputs, upstream, retain_graph=True)
        for result, same in zip(results, expected, strict=True):
            torch.testing.assert_close(result, same)
