"""Fixes an error of Triton's interpreter and makes it faster, because tests are about the kernels."""

import dataclasses
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def patch_interpreter() -> None:
    """Called once, before a kernel runs."""
    _round_bfloat16_to_nearest()
    # Checks for overflow take half of the time; indices of a test are small.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _patch_once()


def _patch_once() -> None:
    """The interpreter patches Triton's language for every call of a function, a quarter of its time. The launch has
    already done so, except in modules that import the language under another name: patch those once."""
    patched = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if (module := function.fn.__module__) not in patched:
            interpreter._patch_lang(function.fn)
            patched.add(module)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _round_bfloat16_to_nearest() -> None:
    """Conversions to bfloat16 round as on a GPU; those of the interpreter truncate."""
    convert = interpreter._convert_float

    def converted(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            floats = torch.from_numpy(np.ascontiguousarray(values)).view(torch.float32)
            return floats.to(torch.bfloat16).view(torch.uint16).numpy().reshape(values.shape)
        if source == tl.bfloat16 and target == tl.float32:
            halves = torch.from_numpy(np.ascontiguousarray(values)).view(torch.bfloat16)
            return halves.float().view(torch.uint32).numpy().reshape(values.shape)
        return convert(values, source, target, rounding_mode)

    interpreter._convert_float = converted
