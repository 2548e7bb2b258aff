"""Both ops and the loss inside CUDA graphs."""

import pytest
import torch
from op_cases import DIRECTIONS
from oracles import torch_lowpass
from steps import Step, assert_same, info_nce_step, lfcc_step, lowpass_step, warm_up
from torch import Tensor, randn

pytestmark = pytest.mark.gpu


def captured(step: Step, mode: str = "global") -> Step:
    """The step as a CUDA graph: every call replays it and returns the same tensors, overwritten."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        results = step()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def assert_replay_follows_its_inputs(step: Step, replay: Step, inputs: list[Tensor]) -> None:
    """Three times with other contents, alternating with calls that are not replayed."""
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


def test_graph_of_a_new_map_size(device: torch.device) -> None:
    """Data cached per map size must be valid inside and outside the graph.

    A map that differs only in size loads the kernels, because CUDA cannot load one during capture.
    """
    warm_up(lowpass_step(device, randn(4, 32, 18, 18, device=device))[0])
    step, inputs = lowpass_step(device, randn(4, 32, 22, 22, device=device))
    replay = captured(step, "relaxed")
    other, _ = lowpass_step(device, inputs[0])
    expected = torch_lowpass(inputs[0].detach(), (1, 2, 4))
    torch.testing.assert_close(other()[0], expected)  # before the graph has run
    torch.testing.assert_close(replay()[0], expected)
    assert_replay_follows_its_inputs(step, replay, inputs)


# Fused kernels have up to 64 values per row in float32 and 128 in 16 bits; these are on both sides of the limit.
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
