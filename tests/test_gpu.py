"""What only a GPU can show: graphs, streams, synchronisation, memory, and sizes at which its paths differ.

Every test takes its device from a fixture and leaves what belongs to CUDA to a few helpers, so that all else in it
can be tried on a CPU in Triton's interpreter.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from op_cases import DIRECTIONS
from oracles import (
    accumulator,
    assert_close_to_truth,
    gradients,
    in_float64,
    rounding,
    torch_info_nce,
    torch_lowpass,
)
from torch import Tensor, randn

import lfcc_kernels as lk
from lfcc_kernels.backends import triton
from lfcc_kernels.filters import Learnable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(triton.INTERPRET, reason="TRITON_INTERPRET is set"),
]

Step = Callable[[], list[Tensor]]


@pytest.fixture
def device() -> Iterator[torch.device]:
    if reason := triton.missing():
        pytest.skip(reason)
    with lk.use_backend("triton"):
        yield torch.device("cuda", torch.cuda.current_device())


def step_of(loss: Callable[[], Tensor], learning: list[Tensor]) -> Step:
    """Forward and backward; without anything that learns, forward alone."""

    def step() -> list[Tensor]:
        result = loss()
        if not learning:
            return [result]
        upstream = torch.linspace(0.5, 1.5, result.numel(), device=result.device, dtype=result.dtype)
        return [result.detach(), *torch.autograd.grad(result, learning, upstream.view_as(result))]

    return step


def lowpass_step(
    device: torch.device, x: Tensor | None = None, filters: bool = False, learns: bool = True
) -> tuple[Step, list[Tensor]]:
    """Low-pass of a map, and what it reads."""
    x = randn(4, 32, 14, 14, device=device) if x is None else x
    matrices = [m.detach() for m in Learnable((1, 2, 4)).to(device)(*x.shape[2:])] if filters else []
    matrices = [m + 0.1 * torch.randn_like(m) for m in matrices]
    inputs = [tensor.detach().requires_grad_(learns) for tensor in (x, *matrices)]

    def loss() -> Tensor:
        rows, cols = inputs[1:] if filters else (None, None)
        return lk.lowpass(inputs[0], (1, 2, 4), row_filters=rows, col_filters=cols)

    return step_of(loss, inputs if learns else []), inputs


def info_nce_step(
    device: torch.device,
    batch: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    direction: str = "student_to_teacher",
    temperature: float | Tensor = 0.1,
    learns: bool = True,
    teacher_learns: bool = False,
) -> tuple[Step, list[Tensor]]:
    """Contrast of rows that resemble each other a little, and what it reads; a tensor as temperature learns."""
    common = randn(batch, width, device=device)
    student, teacher = ((common + 2 * torch.randn_like(common)).to(dtype) for _ in range(2))
    inputs = [student.requires_grad_(learns), teacher.requires_grad_(learns and teacher_learns)]
    if isinstance(temperature, Tensor):
        inputs.append(temperature.to(device).requires_grad_(learns))
        temperature = inputs[2]

    def loss() -> Tensor:
        return lk.info_nce(inputs[0], inputs[1], temperature=temperature, direction=direction)

    return step_of(loss, [x for x in inputs if x.requires_grad]), inputs


def lfcc_step(device: torch.device, batch: int, channels: int = 64, size: int = 14) -> tuple[Step, list[Tensor]]:
    """The whole loss of two stages."""
    with device:
        loss = lk.LFCCLoss((channels, channels), (2 * channels, channels))
    student = [randn(batch, channels, side, side, device=device) for side in (size, size // 2)]
    teacher = [randn(batch, c, side, side, device=device) for c, side in ((2 * channels, size), (channels, size // 2))]
    student = [x.requires_grad_() for x in student]
    return step_of(lambda: loss(student, teacher), [*student, *loss.parameters()]), [*student, *teacher]


def warm_up(step: Step) -> None:
    """Load kernels and let libraries take their buffers, on another stream than the default, as PyTorch advises."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def captured(step: Step, mode: str = "global") -> Step:
    """The step as a CUDA graph: every call replays it and returns the same tensors, overwritten."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        results = step()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, same in zip(results, expected, strict=True):
        torch.testing.assert_close(result, same)


def assert_same_bits(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, same in zip(results, expected, strict=True):
        assert torch.equal(result, same)


def assert_replay_follows_its_inputs(step: Step, replay: Step, inputs: list[Tensor]) -> None:
    """Three times with other contents, in turn with calls that are not replayed."""
    for n in range(3):
        expected = [x.clone() for x in step()]
        for result in (results := replay()):
            assert result.isfinite().all()
        assert_same(results, expected)
        with torch.no_grad():
            before = results[0].clone()
            for x in inputs:
                x.copy_(x * (1.25 + n) if x.dim() == 0 else x.flip(0) + torch.randn_like(x))
        assert not torch.equal(replay()[0], before)


LEARNS = pytest.mark.parametrize("learns", [False, True], ids=["forward", "forward and backward"])


@LEARNS
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("filters", [False, True], ids=["average", "filters"])
def test_graph_of_lowpass(device: torch.device, filters: bool, layout: torch.memory_format, learns: bool) -> None:
    x = randn(4, 32, 14, 14, device=device).to(memory_format=layout)
    step, inputs = lowpass_step(device, x, filters, learns)
    warm_up(step)
    assert_replay_follows_its_inputs(step, captured(step), inputs)


def test_graph_of_a_map_size_first_met_in_it(device: torch.device) -> None:
    """What is kept for a map's size must be neither missing in the graph nor left unwritten outside it.

    The kernels are loaded by a map that differs in size alone: CUDA forbids to load one while it records.
    """
    warm_up(lowpass_step(device, randn(4, 32, 18, 18, device=device))[0])
    step, inputs = lowpass_step(device, randn(4, 32, 22, 22, device=device))
    replay = captured(step, "relaxed")
    other, _ = lowpass_step(device, inputs[0])
    expected = torch_lowpass(inputs[0].detach(), (1, 2, 4))
    torch.testing.assert_close(other()[0], expected)  # before the graph has run
    torch.testing.assert_close(replay()[0], expected)
    assert_replay_follows_its_inputs(step, replay, inputs)


# Rows and widths on both sides of where the fused kernels end: float32 to 64 values a row, two bytes to 128.
SHAPES = {
    "fused, float32": (4096, 64, torch.float32),
    "fused, bfloat16": (4096, 128, torch.bfloat16),
    "chunks, float32": (1024, 512, torch.float32),
    "several chunks, bfloat16": (4096, 512, torch.bfloat16),
    "few rows, float16": (256, 64, torch.float16),
}


@LEARNS
@pytest.mark.parametrize("temperature", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_graph_of_info_nce(
    device: torch.device, shape: str, direction: str, temperature: float | Tensor, learns: bool
) -> None:
    if isinstance(temperature, Tensor):
        temperature = temperature.clone()
    step, inputs = info_nce_step(device, *SHAPES[shape], direction, temperature, learns)
    warm_up(step)
    assert_replay_follows_its_inputs(step, captured(step), inputs)


def test_graph_of_the_whole_loss(device: torch.device) -> None:
    step, inputs = lfcc_step(device, 64)
    warm_up(step)
    assert_replay_follows_its_inputs(step, captured(step), inputs)


def test_a_bad_temperature_on_the_gpu_is_nan(device: torch.device) -> None:
    """No host reads it, so that nothing waits; the loss and its gradients say it."""
    for width in (64, 512):
        for bad in (0.0, -1.0, torch.inf, torch.nan):
            step, _ = info_nce_step(device, 4096, width, temperature=torch.tensor(bad))
            assert all(result.isnan().all() for result in step())


BITS = {
    "lowpass": lambda device: lowpass_step(device, randn(8, 64, 56, 56, device=device), filters=True),
    "lowpass, channels_last": lambda device: lowpass_step(
        device, randn(8, 64, 56, 56, device=device).to(memory_format=torch.channels_last), filters=True
    ),
    "lowpass, average, bfloat16": lambda device: lowpass_step(
        device, randn(8, 64, 56, 56, device=device, dtype=torch.bfloat16)
    ),
    "loss": lambda device: lfcc_step(device, 128),
    "loss, pairs one after the other": lambda device: lfcc_step(device, 2048),
}
for _dtype in (torch.float32, torch.bfloat16, torch.float16):
    for _width in (64, 512):
        for _direction in DIRECTIONS:
            BITS[f"{_direction}, {_width}, {_dtype}"] = lambda device, w=_width, t=_dtype, d=_direction: info_nce_step(
                device, 4096, w, t, d, torch.tensor(0.1), teacher_learns=True
            )


@pytest.mark.parametrize("case", BITS)
def test_same_bits_twice(device: torch.device, case: str) -> None:
    step, _ = BITS[case](device)
    first = [x.clone() for x in step()]
    for _ in range(3):
        # Between the repeats memory is handed out anew, so that what is read before it is written differs.
        torch.full_like(first[1], torch.nan)
        assert_same_bits(step(), first)


class Peak:
    """Bytes that a block held beyond those before it; of its results too."""

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
    """Bytes held beyond inputs, results and gradients."""
    step()  # libraries take their own buffers with the first call
    with peak_memory() as peak:
        results = step()
    return peak.bytes - sum(result.nbytes for result in results)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_contrast_does_not_hold_the_matrix(device: torch.device, dtype: torch.dtype, direction: str) -> None:
    batch, width = 16384, 128
    step, _ = info_nce_step(device, batch, width, dtype, direction)
    # Packed rows, sums in float32 and their parts, or a few chunks; the similarities alone are 512 MiB at two bytes.
    assert working_memory(step) < batch * batch * 2 / 4


def test_memory_of_the_whole_loss_grows_with_the_batch(device: torch.device) -> None:
    """From where a batch's products are no more held together, by twice for twice the batch."""
    small, large = (working_memory(lfcc_step(device, batch, channels=32)[0]) for batch in (2048, 4096))
    assert small > 0 and large < 2.3 * small
    assert large < 6 * 4096 * 4096 * 4  # one number for every similarity, of which plain torch holds several


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """An error for what makes the host wait for the GPU."""
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
    "loss, pairs one after the other": lambda device: lfcc_step(device, 2048, channels=16),
}


@pytest.mark.parametrize("case", WAITLESS)
def test_the_host_waits_for_nothing(device: torch.device, case: str) -> None:
    step, _ = WAITLESS[case](device)
    step()
    with no_synchronisation():
        step()


def check_contrast(device: torch.device, batch: int, width: int, dtype: torch.dtype, direction: str) -> None:
    """Loss and gradients against float64, within a few times torch's own error in this type."""
    total = accumulator(dtype)
    step, inputs = info_nce_step(
        device, batch, width, dtype, direction, torch.tensor(0.1, dtype=total), teacher_learns=True
    )
    exact = in_float64(*inputs)
    with device:  # the oracles make indices of their own
        reference, truth = (
            torch_info_nce(*sides[:2], temperature=sides[2], direction=direction) for sides in (inputs, exact)
        )
    loss, *results = step()
    logit = 10.0
    precision = rounding(total, logit)
    upstream = 0.5  # what `step_of` gives a single number
    assert_close_to_truth(loss, reference.detach(), truth.detach(), factor=2, floor=4 * precision)
    expected = gradients(upstream * reference, inputs), gradients(upstream * truth, exact)
    for result, same, exact_gradient in zip(results, *expected, strict=True):
        # A logit is known to its rounding, which moves a row's weights and so its gradient by as large a part.
        largest = exact_gradient.abs().max().item() if result.dim() else logit / 0.1
        floor = rounding(result.dtype, exact_gradient) + precision * largest
        assert_close_to_truth(result, same, exact_gradient, factor=3, floor=floor)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "width"), [(2048, 128), (2048, 512), (4096, 64), (4096, 128), (4111, 125)], ids=str)
def test_gradients(device: torch.device, batch: int, width: int, dtype: torch.dtype, direction: str) -> None:
    check_contrast(device, batch, width, dtype, direction)


def check_lowpass(device: torch.device, x: Tensor, filters: bool) -> None:
    step, inputs = lowpass_step(device, x, filters)
    exact = in_float64(*inputs)
    with device:
        reference, truth = (torch_lowpass(given[0], (1, 2, 4), *given[1:]) for given in (inputs, exact))
    results = step()
    upstream = torch.linspace(0.5, 1.5, reference.numel(), device=device, dtype=reference.dtype).view_as(reference)
    expected = gradients(reference, inputs, upstream), gradients(truth, exact, upstream.double())
    pairs = zip(results, (reference.detach(), *expected[0]), (truth.detach(), *expected[1]), strict=True)
    for result, same, exact_result in pairs:
        assert_close_to_truth(result, same, exact_result, factor=3, floor=4 * rounding(result.dtype, exact_result))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("filters", [False, True], ids=["average", "filters"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(32, 256, 56, 56), (128, 512, 7, 7), (16, 100, 28, 20)], ids=str)
def test_lowpass_and_its_gradients(
    device: torch.device,
    shape: tuple[int, ...],
    layout: torch.memory_format,
    filters: bool,
    dtype: torch.dtype,
) -> None:
    check_lowpass(device, randn(shape, device=device).to(dtype).to(memory_format=layout), filters)


def delay() -> None:
    """Keeps the current stream busy for a while, so that what does not wait for it is early."""
    torch.cuda._sleep(100_000_000)


def test_second_stream(device: torch.device) -> None:
    """Both streams meet a map's size at once; neither may read what the other is still to write."""
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


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compiled_loss(device: torch.device, direction: str) -> None:
    torch._dynamo.reset()
    with device:
        loss = lk.LFCCLoss((8, 16), (12, 20), direction=direction, learnable_temperature=True)
    student = [randn(32, c, side, side, device=device, requires_grad=True) for c, side in ((8, 14), (16, 7))]
    teacher = [randn(32, c, side, side, device=device) for c, side in ((12, 14), (20, 7))]
    learning = [*student, *loss.parameters()]
    expected = step_of(lambda: loss(student, teacher), learning)()
    compiled = torch.compile(loss, fullgraph=True)
    for result, same in zip(step_of(lambda: compiled(student, teacher), learning)(), expected, strict=True):
        torch.testing.assert_close(result, same, rtol=1e-4, atol=1e-5)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("batch", "width"), [(4096, 64), (1024, 512)], ids=["fused", "chunks"])
def test_tf32_is_used_only_where_it_is_allowed(device: torch.device, batch: int, width: int) -> None:
    """It keeps 11 of 24 bits, which shows."""
    step, inputs = info_nce_step(device, batch, width)
    exact = in_float64(*inputs)
    with device:
        truth = torch_info_nce(*exact)
        truth_grad = gradients(0.5 * truth, exact)[0]
    errors = {}
    for allowed in (False, True):
        with tf32(allowed):
            errors[allowed] = (step()[1].double() - truth_grad).abs().max().item() / truth_grad.abs().max().item()
    assert errors[False] < 1e-5
    assert 10 * errors[False] < errors[True] < 1e-2


def test_lowpass_never_uses_tf32(device: torch.device) -> None:
    """As torch's pooling does not; the map is read once either way, so TF32 would be no faster."""
    x = randn(4, 64, 28, 28, device=device)
    step, _ = lowpass_step(device, x, filters=True)
    with tf32(False):
        exact = step()
    with tf32(True):
        assert_same_bits(step(), exact)
