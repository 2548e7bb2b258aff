"""Schemas of the ops `lfcc::*` that the backends implement; importing this module defines them.

Each op has one schema and one overload per backend: `default` for `cpu`, `triton` and `cuda`. The choice of backend is
therefore part of a graph, and a backward pass, which may run in another thread, stays on the backend of its forward
pass.

The compiled library `_C` defines the default overloads (`csrc/bindings.cpp` repeats the schemas; tests/test_ops.py
compares them) and implements `default` and `cuda`. Everything else is defined here. Without `_C` that includes the
default overloads, so that `lfcc_kernels.ops` can register fakes and autograd formulas for all of them.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from lfcc_kernels.backends import native  # loads _C first, which defines the default overloads

OVERLOADS = {"cpu": "default", "triton": "triton", "cuda": "cuda"}

_FILTERS = "int[] scales, Tensor? row_filters, Tensor? col_filters, int[] grid, int prefix_tokens"
_FILTER_LISTS = "int[] scales, Tensor[] row_filters, Tensor[] col_filters, int[] grids, int[] prefix_tokens"
_CONTRAST = (
    "Tensor student, Tensor teacher, Tensor temperature, Tensor? student_ids, Tensor? teacher_ids, int positive_offset"
)

# Family of ops (for Triton also the module of backends/triton that implements it), its backends, its schemas.
_FAMILIES: list[tuple[str, tuple[str, ...], list[str]]] = [
    (
        "lowpass",
        ("cpu", "triton", "cuda"),
        [
            f"lowpass(Tensor x, {_FILTERS}) -> Tensor",
            f"lowpass_input_grad(Tensor grad, SymInt[] size, bool channels_last, {_FILTERS}) -> Tensor",
            "lowpass_filter_grad(Tensor grad, Tensor x, int[] scales, Tensor row_filters, Tensor col_filters, "
            "int[] grid, int prefix_tokens) -> (Tensor, Tensor)",
        ],
    ),
    (
        "lowpass_foreach",
        ("cuda",),
        [
            f"lowpass_foreach(Tensor[] maps, {_FILTER_LISTS}) -> Tensor[]",
            f"lowpass_foreach_input_grad(Tensor[] grads, SymInt[] sizes, int[] channels_last, {_FILTER_LISTS}) "
            "-> Tensor[]",
        ],
    ),
    (
        "info_nce",
        ("cpu", "triton", "cuda"),
        [
            f"info_nce({_CONTRAST}, bool symmetric, bool normalize, bool mean) "
            "-> (Tensor loss, Tensor row_lse, Tensor col_lse)",
            f"info_nce_one_pass({_CONTRAST}, bool normalize, bool mean) "
            "-> (Tensor loss, Tensor row_lse, Tensor student_grad, Tensor temperature_grad)",
            f"info_nce_grad(Tensor grad, {_CONTRAST}, bool symmetric, bool normalize, Tensor row_lse, Tensor col_lse, "
            "bool of_teacher) -> (Tensor side_grad, Tensor temperature_grad)",
        ],
    ),
    (
        "info_nce_foreach",
        ("triton",),
        [
            "info_nce_foreach(Tensor[] students, Tensor[] teachers, Tensor temperature, Tensor? student_ids, "
            "Tensor? teacher_ids, int positive_offset, bool normalize) "
            "-> (Tensor losses, Tensor student_grads, Tensor temperature_grads, Tensor columns)"
        ],
    ),
]

SCHEMAS: dict[str, str] = {}  # by name of the op
BACKENDS: dict[str, tuple[str, ...]] = {}  # that implement the op

library = torch.library.Library("lfcc", "FRAGMENT")


def qualified(name: str, backend: str) -> str:
    """Name of an op's overload for a backend, as `torch.library` expects it, e.g. "lfcc::lowpass.cuda"."""
    return f"lfcc::{name}.{OVERLOADS[backend]}".removesuffix(".default")


def _define(family: str, backends: tuple[str, ...], schema: str) -> None:
    name, _, arguments = schema.partition("(")
    SCHEMAS[name], BACKENDS[name] = schema, backends
    if native.missing and "cpu" in backends:
        library.define(schema)
    if "cuda" in backends:
        library.define(f"{name}.cuda({arguments}")
    if "triton" in backends:
        library.define(f"{name}.triton({arguments}")
        for key in ("CPU", "CUDA"):
            library.impl(f"{name}.triton", _imported_at_first_call(family, name), key)


def _imported_at_first_call(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of a module in backends/triton, imported late because it needs the package Triton."""
    path = f"lfcc_kernels.backends.triton.{module}"
    return lambda *arguments: getattr(importlib.import_module(path), name)(*arguments)


for _family, _backends, _schemas in _FAMILIES:
    for _schema in _schemas:
        _define(_family, _backends, _schema)
