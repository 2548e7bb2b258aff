"""All cases of the benchmark: inputs, candidates, the least work of each and the formula that counts it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import lfcc_kernels as lk
from lfcc_kernels.bench.cases import info_nce, lfcc, lowpass, overhead, scaling, step
from lfcc_kernels.bench.cases.base import Candidate, Case, Step, WithConversion
from lfcc_kernels.bench.machine import Machine
from lfcc_kernels.bench.record import Request
from lfcc_kernels.ops.dispatch import select

__all__ = ["SUITES", "Candidate", "Case", "Step", "WithConversion", "backend_of", "choose", "variants"]

# In the order of measurement: the longest suites come last, for runs with a time limit. A suite is a function of the
# machine, whose size selects full or tiny shapes, and of a dtype that replaces the one of each case.
SUITES: dict[str, Callable[[Machine, torch.dtype | None], list[Case]]] = {
    "overhead": overhead.cases,
    "lowpass": lowpass.cases,
    "info_nce": info_nce.cases,
    "lfcc": lfcc.cases,
    "scaling": scaling.cases,
    "step": step.cases,
}


def variants(request: Request, machine: Machine) -> list[Case]:
    """All cases of the requested suites, with the requested candidates. Tiny and full cases have the same order."""
    dtype = getattr(torch, request.dtype) if request.dtype else None
    suites = (make(machine, dtype) for suite, make in SUITES.items() if suite in request.suites)
    return [replace(case, candidates=_candidates(case, request, machine)) for suite in suites for case in suite]


def choose(request: Request, machine: Machine) -> list[Case]:
    """The cases of a request, without duplicate names."""
    named = {case.name: case for case in variants(request, machine)}
    return [
        case
        for name, case in named.items()
        if (case.quick or machine.size != "quick")
        and (not request.words or any(word in name for word in request.words))
    ]


def backend_of(case: Case, request: Request, machine: Machine) -> str:
    """The backend of lfcc in a case; "auto" if there may be several."""
    if request.backend or not case.op:
        return request.backend or "auto"
    return select(case.op, machine.device, case.dtype, case.size)


def _candidates(case: Case, request: Request, machine: Machine) -> dict[str, Candidate]:
    """lfcc, also on every other backend if the request names none, and the requested peers."""
    lfcc = case.candidates["lfcc"]
    candidates = {
        name: call
        for name, call in case.candidates.items()
        if name in ("lfcc", "eager") or not request.peers or any(peer in name for peer in request.peers)
    }
    if request.backend:
        return candidates | {"lfcc": partial(_on_backend, request.backend, lfcc)}
    kernels = ("triton", "cuda") if machine.gpu else ("cpu",)
    backends = [name for name in (*kernels, "eager") if name in lk.available_backends()]
    backends.remove(backend_of(case, request, machine) if case.op else backends[0])  # the one of "lfcc"
    return candidates | {f"lfcc, {name}": partial(_on_backend, name, lfcc) for name in backends}


def _on_backend(backend: str, call: Candidate, *inputs: Tensor) -> Tensor:
    with lk.use_backend(backend):
        return call(*inputs)
