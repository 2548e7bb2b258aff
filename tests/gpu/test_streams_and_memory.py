"""Memory, streams, devices and synchronisation of the ops."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from op_cases import DIRECTIONS
from oracles import torch_lowpass
from steps import Step, assert_same, assert_same_bits, info_nce_step, lfcc_step, lowpass_step, warm_up
from torch import randn

pytestmark = pytest.mark.gpu


class Peak:
    """Peak bytes of a block beyond those before it, including its results."""

    bytes = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, peak = torch.cuda.memory_allocated(), Peak()
    yield peak
    torch.cuda.synchronize()
    peak.bytes = torch.cuda.max_memory_allocated() - before


def working_memory(step: Step) -> int:
    """Peak bytes beyond inputs, results and gradients."""
    step()  # libraries allocate their buffers in the first call
    with peak_memory() as peak:
        results = step()
    return peak.bytes - sum(result.nbytes for result in results)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_contrast_does_not_store_the_matrix(device: torch.device, dtype: torch.dtype, direction: str) -> None:
    batch, width = 16384, 128
    step, _ = info_nce_step(device, batch, width, dtype, direction)
    # Packed rows, sums in float32 and their parts, or a few chunks; the similarities alone are 512 MiB at two bytes.
    assert working_memory(step) < batch * batch * 2 / 4


def test_memory_of_the_whole_loss_grows_with_the_batch(device: torch.device) -> None:
    """Linearly, from the batch size on at which pairs are processed sequentially."""
    small, large = (working_memory(lfcc_step(device, batch, channels=32)[0]) for batch in (2048, 4096))
    assert small > 0 and large < 2.3 * small
    assert large < 6 * 4096 * 4096 * 4  # one value per logit; plain torch stores several


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise if the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


WAITLESS = {
    "average": lambda device: lowpass_step(device),
    "filters": lambda device: lowpass_step(device, filters=True),
    "fused": lambda device: info_nce_step(device, 4096, 64),
    "fused, symmetric": lambda device: info_nce_step(device, 4096, 64, direction="symmetric"),
    "chunks": lambda device: info_nce_step(device, 1024, 512),
    "chunks, float16, symmetric": lambda device: info_nce_step(device, 1024, 512, torch.float16, "symmetric"),
    "teacher_to_student": lambda device: info_nce_step(device, 1024, 512, direction="teacher_to_student"),
    "float64": lambda device: info_nce_step(device, 256, 64, torch.float64),
    "temperature on the GPU": lambda device: info_nce_step(device, 1024, 512, temperature=torch.tensor(0.1)),
    "loss": lambda device: lfcc_step(device, 64),
    "loss, sequential pairs": lambda device: lfcc_step(device, 2048, channels=16),
}


@pytest.mark.parametrize("case", WAITLESS)
def test_the_host_does_not_wait(device: torch.device, case: str) -> None:
    step, _ = WAITLESS[case](device)
    step()
    with no_synchronisation():
        step()


def delay() -> None:
    """Delays the current stream, so that work that does not wait for it runs too early."""
    torch.cuda._sleep(100_000_000)


def test_second_stream(device: torch.device) -> None:
    """Both streams use a new map size; neither may read data that the other has not written yet."""
    x = randn(4, 32, 26, 26, device=device)
    steps = [lowpass_step(device, x)[0], info_nce_step(device, 4096, 64)[0], info_nce_step(device, 1024, 512)[0]]
    warm_up(lowpass_step(device, randn(4, 32, 30, 30, device=device))[0])
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    results = []
    for n, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            if n == 0:
                delay()
            results.append([step() for step in steps])
    torch.cuda.synchronize()
    torch.testing.assert_close(results[1][0][0], torch_lowpass(x, (1, 2, 4)))
    for first, second, step in zip(*results, steps, strict=True):
        assert_same_bits(first, second)
        assert_same_bits(second, step())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current(device: torch.device) -> None:
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    for make in (lowpass_step, lambda device: info_nce_step(device, 1024, 64), lambda device: lfcc_step(device, 64)):
        torch.manual_seed(0)
        here, _ = make(device)
        torch.manual_seed(0)
        there, inputs = make(other)
        assert all(x.device == other for x in inputs)
        assert torch.cuda.current_device() == device.index
        results = there()
        assert all(result.device == other for result in results)
        assert_same([result.to(device) for result in results], here())
