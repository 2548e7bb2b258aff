"""The ops as torch sees them: schemas, fakes, autograd, compilation, and where they refuse."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import CALLS, FUNCTIONS, functions, skip_unless_served

import lfcc_kernels as lk
from lfcc_kernels.backends import native
from lfcc_kernels.ops import info_nce, lowpass
from lfcc_kernels.ops.registration import op


def test_kernels_are_built_where_a_compiler_is() -> None:
    """So that a run without kernels, which skips most tests, passes only where it must."""
    if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        assert "cpu" in lk.available_backends(), native.missing


def _name(schema: str) -> str:
    return schema.partition("(")[0]


@pytest.mark.parametrize("schema", [*lowpass.SCHEMAS, *info_nce.SCHEMAS], ids=_name)
def test_compiled_schemas_are_those_in_python(compiled_kernels: str, schema: str) -> None:
    expected = torch._C.parse_schema(f"lfcc::{schema}")
    assert str(op(_name(schema), "cpu")._schema) == str(expected)


@pytest.mark.parametrize("overload", ["triton", "cuda"])
@pytest.mark.parametrize("schema", [*lowpass.SCHEMAS, *info_nce.SCHEMAS], ids=_name)
def test_overloads_differ_in_their_name_alone(schema: str, overload: str) -> None:
    compiled, other = (str(op(_name(schema), backend)._schema) for backend in ("cpu", overload))
    assert other == compiled.replace("(", f".{overload}(", 1)


def test_calls_name_every_op() -> None:
    schemas = [schema for ops in (lowpass, info_nce) for schema in (*ops.SCHEMAS, *ops.FOREACH_SCHEMAS)]
    assert {name for name, _ in CALLS.values()} == set(map(_name, schemas))


@pytest.mark.parametrize(("name", "arguments"), CALLS.values(), ids=CALLS)
def test_opcheck(kernels: str, name: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
    skip_unless_served(name, kernels)
    torch.library.opcheck(op(name, kernels), arguments())


@pytest.mark.slow_on("eager")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(backend: str, name: str) -> None:
    """Every entry of the Jacobian; of Triton, whose interpreter is slow, products of it with random vectors."""
    function, inputs = functions()[name]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=backend == "triton")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivative_on_eager(name: str) -> None:
    function, inputs = functions()[name]
    with lk.use_backend("eager"):
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivative_names_the_backend_that_has_one(kernels: str, name: str) -> None:
    """For each input by itself, among them those in which the op is linear."""
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
