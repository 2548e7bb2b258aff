"""How `lfcc bench --tune` takes hold of launches: compiled all at once, checked for spills, timed on the device."""

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

_HEAD_START = 4_000_000  # clock cycles, about 2 ms, in which the host enqueues a call


class DeviceClock:
    """Seconds that the GPU needs for a call which it finds enqueued, with nothing of its inputs in a cache."""

    def __init__(self, device: torch.device) -> None:
        self._other = torch.zeros(2 * runtime.device_props(device).l2_bytes // 4, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_HEAD_START)
        self._other.sum()  # reads, so that no lines are left which would first have to be written back
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@contextmanager
def compiling() -> Iterator[None]:
    """In this block launchers compile what they would launch, in threads, and launch nothing; errors come later, with
    the launch. Triton's compiler is mostly outside Python's lock."""
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        with _launching(_compile), triton.AsyncCompileMode(threads, ignore_errors=True):
            yield
    finally:
        threads.shutdown(cancel_futures=True)


@contextmanager
def counting_spills() -> Iterator[list[int]]:
    """The list gets, for every launch in this block, how many registers of its kernel live in memory."""
    spills: list[int] = []

    def launch_and_count(launch: Callable, *arguments: Any, **options: Any) -> Any:
        compiled = launch(*arguments, **options)
        spills.append(getattr(compiled, "n_spills", 0))  # the interpreter gives back nothing
        return compiled

    with _launching(launch_and_count):
        yield spills


def _compile(launch: Callable, *arguments: Any, **options: Any) -> Any:
    return launch(*arguments, **{**options, "warmup": True})


@contextmanager
def _launching(instead: Callable) -> Iterator[None]:
    """In this block every launch is `instead(launch, *arguments, **options)`."""
    kernels = InterpretedFunction if INTERPRET else JITFunction
    launch = kernels.run
    kernels.run = lambda kernel, *arguments, **options: instead(partial(launch, kernel), *arguments, **options)
    try:
        yield
    finally:
        kernels.run = launch
