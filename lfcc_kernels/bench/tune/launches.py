"""Launches of `lfcc bench --tune`: compiled in parallel, checked for register spills, timed by the device."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from lfcc_kernels.backends.triton import INTERPRET, runtime

_HEAD_START = 4_000_000  # clock cycles, about 2 ms, for the host to enqueue a call


class DeviceClock:
    """GPU time in seconds of a call that is enqueued beforehand and whose inputs are in no cache."""

    def __init__(self, device: torch.device) -> None:
        self._other = torch.zeros(2 * runtime.device_props(device).l2_bytes // 4, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_HEAD_START)
        self._other.sum()  # a read leaves no dirty lines in L2, which would be written back during the call
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@contextmanager
def compiling() -> Iterator[None]:
    """In this block launches only compile their kernel, in threads; the launch itself reports errors later.

    Triton's compiler mostly runs without the GIL.
    """
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        with _launching(_compile), triton.AsyncCompileMode(threads, ignore_errors=True):
            yield
    finally:
        threads.shutdown(cancel_futures=True)


@contextmanager
def counting_spills() -> Iterator[list[int]]:
    """Yields a list to which every launch in this block appends the number of spilled registers of its kernel."""
    spills: list[int] = []

    def launch_and_count(launch: Callable, *arguments: Any, **options: Any) -> Any:
        compiled = launch(*arguments, **options)
        spills.append(getattr(compiled, "n_spills", 0))  # the interpreter returns None
        return compiled

    with _launching(launch_and_count):
        yield spills


def _compile(launch: Callable, *arguments: Any, **options: Any) -> Any:
    return launch(*arguments, **{**options, "warmup": True})


@contextmanager
def _launching(instead: Callable) -> Iterator[None]:
    """In this block every launch calls `instead(launch, *arguments, **options)`."""
    kernels = InterpretedFunction if INTERPRET else JITFunction
    launch = kernels.run
    kernels.run = lambda kernel, *arguments, **options: instead(partial(launch, kernel), *arguments, **options)
    try:
        yield
    finally:
        kernels.run = launch
