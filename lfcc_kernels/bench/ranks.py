"""Processes of one machine that contrast together, each its own rows with the teacher's rows of all.

The benchmark's process is rank 0 and calls its candidates as it always does; every call is sent to the other ranks,
which make it too. Ranks talk by gloo on a CPU and by nccl on GPUs, of which each needs one. Where there are more ranks
than cores they share those.
"""

import signal
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import lfcc_kernels as lk
from lfcc_kernels.bench import machine, peers
from lfcc_kernels.ops.dispatch import select

PATIENCE = 120  # seconds that ranks wait for each other

Loss = Callable[[Tensor, Tensor], Tensor]  # of rows of a student and of a frozen teacher
MakeRows = Callable[[], tuple[Tensor, Tensor]]


def ours(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`InfoNCELoss`, which gathers by itself."""
    return lk.InfoNCELoss(temperature)(student, teacher)


def eager(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """torch's gather, then the matrix of this rank's rows and all keys."""
    return peers.contrast_dense(student, _keys_of_all(teacher), temperature)


def linear_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """torch's gather, then its chunked cross entropy."""
    return peers.contrast_linear_cross_entropy(student, _keys_of_all(teacher), temperature)


class World:
    """`size` ranks, of which this process is rank 0.

    The others start with the first call and end with `close`; until then each rank has its part of this process's
    threads. Rank r makes its rows once, by `make_rows` with seed r. A call raises NotImplementedError where there are
    fewer GPUs than ranks.
    """

    def __init__(self, size: int, make_rows: MakeRows) -> None:
        self._size, self._make_rows = size, make_rows
        self._to_undo = ExitStack()
        self._pipes: list[Connection] | None = None  # None before the start
        self._calling = False

    def candidate(self, loss: Loss) -> Loss:
        """The loss called in all ranks, which must be able to unpickle it; rows and result are those of rank 0."""
        return partial(self._call, loss)

    def wait(self) -> None:
        """Wait until all ranks have done the last call and its backward pass; RuntimeError where one could not."""
        if failures := self._answers():
            raise RuntimeError(failures[0])

    def close(self) -> None:
        """End the other ranks."""
        self._pipes, self._calling = None, False
        self._to_undo.close()

    def _call(self, loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
        if self._pipes is None:
            self._start()
        self._answers()  # to a call that nobody waited for
        learns = torch.is_grad_enabled() and student.requires_grad
        backend = select("info_nce", student.device, student.dtype, self._size * len(student) ** 2)
        for pipe in self._pipes:
            pipe.send(_Call(loss, student.dtype, learns, backend))
        self._calling = True
        return loss(student, teacher)

    def _answers(self) -> list[str]:
        """Why ranks could not make the call in hand, if there is one."""
        failures = []
        for rank, pipe in enumerate(self._pipes if self._calling else (), 1):
            try:
                answer = pipe.recv() if pipe.poll(PATIENCE) else None
            except EOFError:
                answer = None
            if answer is None:
                self.close()  # the next call starts anew
                raise RuntimeError(f"rank {rank} of {self._size} has ended, or did not answer in {PATIENCE} seconds")
            failures += [f"rank {rank}: {answer}"] if answer else []
        self._calling = False
        return failures

    def _start(self) -> None:
        if machine.HERE.device.type == "cuda" and torch.cuda.device_count() < self._size:
            raise NotImplementedError(f"{self._size} ranks need a GPU each, here are {torch.cuda.device_count()}")
        threads = torch.get_num_threads()
        share = max(1, threads // self._size)
        self._pipes = []
        try:
            store = self._to_undo.enter_context(tempfile.TemporaryDirectory()) + "/store"
            for rank in range(1, self._size):
                self._pipes.append(self._follower(rank, store, share))
            torch.set_num_threads(share)
            self._to_undo.callback(torch.set_num_threads, threads)
            _join(0, self._size, store)
            self._to_undo.callback(dist.destroy_process_group)
            self._to_undo.callback(_dismiss, self._pipes)  # before the group goes, which may want all to leave it
        except BaseException:
            self.close()
            raise

    def _follower(self, rank: int, store: str, threads: int) -> Connection:
        """Starts another rank; the pipe to it."""
        spawn = get_context("spawn")
        pipe, theirs = spawn.Pipe()
        arguments = (rank, self._size, store, theirs, threads, self._make_rows)
        process = spawn.Process(target=_follow, args=arguments, daemon=True)
        process.start()
        theirs.close()  # so that the end of the process ends the pipe
        self._to_undo.callback(_end, process, pipe)
        return pipe


class _Call(NamedTuple):
    """What another rank shall do."""

    loss: Loss
    dtype: torch.dtype  # of its rows
    learns: bool  # whether the student's rows want their gradient
    backend: str


def _dismiss(pipes: list[Connection]) -> None:
    for pipe in pipes:
        with suppress(OSError):
            pipe.send(None)


def _end(process: BaseProcess, pipe: Connection) -> None:
    pipe.close()
    process.join(10)
    process.kill()
    process.join()
    process.close()


def _join(rank: int, size: int, store: str) -> None:
    backend = "nccl" if machine.HERE.device.type == "cuda" else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, f"file://{store}", timedelta(seconds=PATIENCE), rank=rank, world_size=size)


def _follow(rank: int, size: int, store: str, pipe: Connection, threads: int, make_rows: MakeRows) -> None:
    """The process of another rank: makes the calls of rank 0 until that sends None or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends this one
    torch.set_num_threads(threads)
    _join(rank, size, store)
    torch.manual_seed(rank)
    student, teacher = make_rows()
    with suppress(EOFError, BrokenPipeError):
        while call := pipe.recv():
            pipe.send(_make(call, student, teacher))
    dist.destroy_process_group()


def _make(call: _Call, student: Tensor, teacher: Tensor) -> str:
    """Why the call could not be made, or nothing."""
    student = student.detach().to(call.dtype).requires_grad_(call.learns)
    try:
        with lk.use_backend(call.backend):
            loss = call.loss(student, teacher.to(call.dtype))
            if call.learns:
                loss.backward()
        if machine.HERE.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _keys_of_all(teacher: Tensor) -> Tensor:
    """The teacher's rows of all ranks, this one's first: so a row's positive is where it is with one rank."""
    parts, rank = [torch.empty_like(teacher) for _ in range(dist.get_world_size())], dist.get_rank()
    dist.all_gather(parts, teacher)
    return torch.cat(parts[rank:] + parts[:rank])
