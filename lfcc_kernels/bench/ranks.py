"""Several ranks on one machine, each contrasting its own rows with the teacher's rows of all ranks.

The benchmark's process is rank 0 and calls its candidates as in any other case; each call is sent to the other ranks,
which make the same call. Ranks communicate by gloo on a CPU and by NCCL on GPUs, one GPU per rank. Ranks beyond the
number of cores share them.
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
from lfcc_kernels.bench.peers import contrast
from lfcc_kernels.ops.dispatch import select

TIMEOUT = 120  # seconds that ranks wait for each other

Loss = Callable[[Tensor, Tensor], Tensor]  # of the rows of a student and of a frozen teacher
MakeRows = Callable[[], tuple[Tensor, Tensor]]


def lfcc(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`InfoNCELoss`, which gathers the keys itself."""
    return lk.InfoNCELoss(temperature)(student, teacher)


def eager(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """torch's gather, then the dense logits of this rank's rows and all keys."""
    return contrast.dense(student, _gather_keys(teacher), temperature)


def linear_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """torch's gather, then its chunked cross entropy."""
    return contrast.linear_cross_entropy(student, _gather_keys(teacher), temperature)


class World:
    """`size` ranks on a type of device; this process is rank 0.

    The others start with the first call and end with `close`; until then the ranks share this process's threads. Rank r
    creates its rows once, by `make_rows` with seed r. A call raises NotImplementedError if there are fewer GPUs than
    ranks.
    """

    def __init__(self, device: torch.device, size: int, make_rows: MakeRows) -> None:
        self._device, self._size, self._make_rows = device, size, make_rows
        self._exit_stack = ExitStack()
        self._pipes: list[Connection] | None = None  # None before the start
        self._calling = False

    def candidate(self, loss: Loss) -> Loss:
        """The loss, called on all ranks; it must be picklable. Rows and result are those of rank 0."""
        return partial(self._call, loss)

    def wait(self) -> None:
        """Wait for the last call and its backward pass on all ranks; raises RuntimeError if one failed."""
        if failures := self._answers():
            raise RuntimeError(failures[0])

    def close(self) -> None:
        """End the other ranks."""
        self._pipes, self._calling = None, False
        self._exit_stack.close()

    def _call(self, loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
        if self._pipes is None:
            self._start()
        self._answers()  # of a previous call without `wait`
        learn = torch.is_grad_enabled() and student.requires_grad
        backend = select("info_nce", student.device, student.dtype, self._size * len(student) ** 2)
        for pipe in self._pipes:
            pipe.send(_Call(loss, student.dtype, learn, backend))
        self._calling = True
        return loss(student, teacher)

    def _answers(self) -> list[str]:
        """The errors of the current call on other ranks."""
        failures = []
        for rank, pipe in enumerate(self._pipes if self._calling else (), 1):
            try:
                answer = pipe.recv() if pipe.poll(TIMEOUT) else None
            except EOFError:
                answer = None
            if answer is None:
                self.close()  # the next call starts new processes
                raise RuntimeError(f"rank {rank} of {self._size} ended or did not answer within {TIMEOUT} seconds")
            failures += [f"rank {rank}: {answer}"] if answer else []
        self._calling = False
        return failures

    def _start(self) -> None:
        if self._device.type == "cuda" and torch.cuda.device_count() < self._size:
            raise NotImplementedError(f"{self._size} ranks need one GPU each, found {torch.cuda.device_count()}")
        threads = torch.get_num_threads()
        share = max(1, threads // self._size)
        self._pipes = []
        try:
            store = self._exit_stack.enter_context(tempfile.TemporaryDirectory()) + "/store"
            for rank in range(1, self._size):
                self._pipes.append(self._follower(rank, store, share))
            torch.set_num_threads(share)
            self._exit_stack.callback(torch.set_num_threads, threads)
            _join(self._device, 0, self._size, store)
            self._exit_stack.callback(dist.destroy_process_group)
            self._exit_stack.callback(
                _dismiss, self._pipes
            )  # before the group is destroyed, which may wait for all ranks
        except BaseException:
            self.close()
            raise

    def _follower(self, rank: int, store: str, threads: int) -> Connection:
        """Starts another rank; returns the pipe to it."""
        spawn = get_context("spawn")
        pipe, remote = spawn.Pipe()
        arguments = (self._device, rank, self._size, store, remote, threads, self._make_rows)
        process = spawn.Process(target=_follow, args=arguments, daemon=True)
        process.start()
        remote.close()  # so that the end of the process closes the pipe
        self._exit_stack.callback(_end, process, pipe)
        return pipe


class _Call(NamedTuple):
    """A call for the other ranks."""

    loss: Loss
    dtype: torch.dtype  # of the rows
    learn: bool  # whether the student's rows require a gradient
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


def _join(device: torch.device, rank: int, size: int, store: str) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, f"file://{store}", timedelta(seconds=TIMEOUT), rank=rank, world_size=size)


def _follow(
    device: torch.device, rank: int, size: int, store: str, pipe: Connection, threads: int, make_rows: MakeRows
) -> None:
    """The process of another rank: repeats the calls of rank 0 until it sends None or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends this process
    torch.set_num_threads(threads)
    _join(device, rank, size, store)
    torch.manual_seed(rank)
    student, teacher = make_rows()
    with suppress(EOFError, BrokenPipeError):
        while call := pipe.recv():
            pipe.send(_make(call, student, teacher))
    dist.destroy_process_group()


def _make(call: _Call, student: Tensor, teacher: Tensor) -> str:
    """Make the call; returns its error, or an empty string."""
    student = student.detach().to(call.dtype).requires_grad_(call.learn)
    try:
        with lk.use_backend(call.backend):
            loss = call.loss(student, teacher.to(call.dtype))
            if call.learn:
                loss.backward()
        if student.is_cuda:
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _gather_keys(teacher: Tensor) -> Tensor:
    """The teacher's rows of all ranks, this rank's first, so that positives have the same index as on one rank."""
    parts, rank = [torch.empty_like(teacher) for _ in range(dist.get_world_size())], dist.get_rank()
    dist.all_gather(parts, teacher)
    return torch.cat(parts[rank:] + parts[:rank])
