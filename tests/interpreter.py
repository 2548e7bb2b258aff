"""Mends what Triton's interpreter gets wrong and makes it faster: tests are to see the kernels, not the interpreter."""

import dataclasses
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """All of it; called once, before a kernel runs."""
    _round_bfloat16_to_nearest()
    # It looks for overflow after every step, in half of its time; indices of a test are small.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _patch_once()


def _patch_once() -> None:
    """It patches Triton's language for every function that a kernel calls, in a quarter of its time; the launch has
    done that, but for modules that know the language by another name."""
    patched = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if (module := function.fn.__module__) not in patched:
            interpreter._patch_lang(function.fn)
            patched.add(module)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _round_bfloat16_to_nearest() -> None:
    """Conversions to bfloat16 as a GPU does them; the interpreter's own cut the digits off."""
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
