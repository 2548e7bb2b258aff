"""Every case, in one place: its inputs, its candidates, the least it must cost, and how that is counted."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import lfcc_kernels as lk
from lfcc_kernels.bench import machine
from lfcc_kernels.bench.cases import info_nce, lfcc, lowpass, overhead, scaling, step
from lfcc_kernels.bench.cases.base import Candidate, Case, Converting, Step
from lfcc_kernels.bench.record import Request
from lfcc_kernels.ops.dispatch import select

__all__ = ["SUITES", "Candidate", "Case", "Converting", "Step", "choose", "serving", "variants"]

# In the order in which they are measured: the longest come last, for a run whose time is limited. A suite is made
# by whether shapes are to be tiny and by a dtype that all cases shall have instead of their own.
SUITES: dict[str, Callable[[bool, torch.dtype | None], list[Case]]] = {
    "overhead": overhead.cases,
    "lowpass": lowpass.cases,
    "info_nce": info_nce.cases,
    "lfcc": lfcc.cases,
    "scaling": scaling.cases,
    "step": step.cases,
}


def variants(request: Request) -> list[Case]:
    """All cases of the suites asked for, with the candidates asked for, for the machine that is measured. Those of
    size "tiny" stand where those of full size do."""
    dtype = getattr(torch, request.dtype) if request.dtype else None
    suites = (make(request.size == "tiny", dtype) for suite, make in SUITES.items() if suite in request.suites)
    return [replace(case, candidates=_candidates(case, request)) for suite in suites for case in suite]


def choose(request: Request) -> list[Case]:
    """The cases of a request, each name once."""
    named = {case.name: case for case in variants(request)}
    return [
        case
        for name, case in named.items()
        if (case.quick or request.size != "quick")
        and (not request.words or any(word in name for word in request.words))
    ]


def serving(case: Case, request: Request) -> str:
    """The backend behind a case's "ours"; "auto" where it may be several."""
    if request.backend or not case.op:
        return request.backend or "auto"
    return select(case.op, machine.HERE.device, case.dtype, case.size)


def _candidates(case: Case, request: Request) -> dict[str, Candidate]:
    """Ours, by every other backend too where none was named, and the peers asked for."""
    ours = case.candidates["ours"]
    candidates = {
        name: call
        for name, call in case.candidates.items()
        if name in ("ours", "eager") or not request.peers or any(peer in name for peer in request.peers)
    }
    if request.backend:
        return candidates | {"ours": partial(_by, request.backend, ours)}
    kernels = ("triton", "cuda") if machine.HERE.device.type == "cuda" else ("cpu",)
    backends = [name for name in (*kernels, "eager") if name in lk.available_backends()]
    backends.remove(serving(case, request) if case.op else backends[0])  # what "ours" has been timed by already
    return candidates | {f"ours, {name}": partial(_by, name, ours) for name in backends}


def _by(backend: str, call: Candidate, *inputs: Tensor) -> Tensor:
    with lk.use_backend(backend):
        return call(*inputs)
