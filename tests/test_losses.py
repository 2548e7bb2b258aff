"""`InfoNCELoss` and `LFCCLoss` as a training script uses them."""

import math
from typing import Any

import pytest
import torch
from oracles import loop_info_nce, loop_lowpass
from torch import Tensor, nn, randn

import lfcc_kernels as lk

pytestmark = pytest.mark.slow_on("triton")

SCALES = (1, 2, 4)
STUDENT_CHANNELS, TEACHER_CHANNELS = (6, 10), (8, 12)
MAPS = {"student": [(12, 12), (7, 5)], "teacher": [(14, 14), (7, 7)]}
TOKENS = {"student_grid": (6, 5), "student_prefix_tokens": 2, "teacher_prefix_tokens": 1}


def features(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Maps of nine images in two stages; those of the student require gradients."""
    student, teacher = (
        [randn(9, c, *size).to(dtype) for c, size in zip(channels, MAPS[side], strict=True)]
        for side, channels in (("student", STUDENT_CHANNELS), ("teacher", TEACHER_CHANNELS))
    )
    return [x.requires_grad_() for x in student], teacher


def lfcc_loss(**options: Any) -> lk.LFCCLoss:
    """With random filters, as after some training."""
    loss = lk.LFCCLoss(STUDENT_CHANNELS, TEACHER_CHANNELS, **options)
    for parameter in loss.student_filters.parameters():
        nn.init.normal_(parameter, std=0.5)
    return loss


def written_out(
    loss: lk.LFCCLoss, student: list[Tensor], teacher: list[Tensor], **options: Any
) -> dict[tuple[int, int], Tensor]:
    """The parts in float64: project every pixel, then low-pass, then contrast row by row."""
    parts = {}
    for stage, (s, t) in enumerate(zip(student, teacher, strict=True)):
        weight = loss.student_projections[stage].weight.double()
        projected = torch.einsum("tc,bchw->bthw", weight, s.double())
        student_filters = loss.student_filters[stage].bank(*s.shape[2:])
        pooled = loop_lowpass(projected, SCALES, *student_filters), loop_lowpass(t, SCALES)
        start = 0
        for scale in SCALES:
            rows = [y[:, start : start + scale**2].flatten(1) for y in pooled]
            parts[stage, scale] = loop_info_nce(*rows, **options)
            start += scale**2
    return parts


OPTIONS: list[dict[str, Any]] = [
    {},
    {"direction": "symmetric", "temperature": 0.5},
    {"direction": "teacher_to_student", "temperature": 0.02},
    {"student_filter": "average"},
    {"student_filter": "gaussian"},
    {"student_filter": "dct", "temperature": 1.0},
]


@pytest.mark.slow_on()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradients_are_the_formula(backend: str, options: dict[str, Any]) -> None:
    loss, (student, teacher) = lfcc_loss(**options, return_parts=True), features()
    result, parts = loss(student, teacher)
    contrast = {name: options[name] for name in ("direction", "temperature") if name in options}
    expected = written_out(loss, student, teacher, **contrast)
    assert list(parts) == list(expected) == [(stage, scale) for stage in (0, 1) for scale in SCALES]
    for key, part in parts.items():
        torch.testing.assert_close(part.double(), expected[key], rtol=1e-5, atol=1e-5)
    truth = torch.stack(list(expected.values())).mean()
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)

    learning = [*student, *loss.parameters()]
    grads, exact = torch.autograd.grad(result, learning), torch.autograd.grad(truth, learning)
    for grad, exact_grad in zip(grads, exact, strict=True):
        torch.testing.assert_close(grad, exact_grad, rtol=1e-4, atol=2e-5 * exact_grad.abs().max().item())


def test_ids_reach_every_part(backend: str) -> None:
    loss, (student, teacher) = lfcc_loss(), features()
    ids = torch.arange(9) % 4
    expected = written_out(loss, student, teacher, student_ids=ids, teacher_ids=ids)
    truth = torch.stack(list(expected.values())).mean()
    torch.testing.assert_close(loss(student, teacher, ids).double(), truth, rtol=1e-5, atol=1e-5)
    assert loss(student, teacher, ids) < loss(student, teacher)


def test_parameters_are_the_students(backend: str) -> None:
    loss = lk.LFCCLoss(STUDENT_CHANNELS, TEACHER_CHANNELS, teacher_filter="gaussian", learnable_temperature=True)
    shapes = {name: tuple(p.shape) for name, p in loss.named_parameters()}
    assert shapes == {
        "student_projections.0.weight": (8, 6),
        "student_projections.1.weight": (12, 10),
        "student_filters.0.bank.row_logits": (7, 8),
        "student_filters.0.bank.col_logits": (7, 8),
        "student_filters.1.bank.row_logits": (7, 8),
        "student_filters.1.bank.col_logits": (7, 8),
        "info_nce.log_temperature": (1,),
    }
    student, teacher = features()
    loss(student, teacher).backward()
    assert all(p.grad.any() and p.grad.isfinite().all() for p in loss.parameters())


def test_teacher_gets_no_gradient(backend: str) -> None:
    loss, (student, teacher) = lfcc_loss(), features()
    for x in teacher:
        x.requires_grad_()
    loss(student, teacher).backward()
    assert all(x.grad is None for x in teacher) and all(x.grad is not None for x in student)
    pyramids = [p.requires_grad_() for p in loss.teacher_pyramids(teacher)]
    loss.contrast(loss.student_pyramids(student), pyramids).backward()
    assert all(p.grad is None for p in pyramids)


def test_contrast_of_cached_pyramids_is_forward(backend: str) -> None:
    loss, (student, teacher) = lfcc_loss(), features()
    kept = loss.teacher_pyramids(teacher)
    assert [tuple(p.shape) for p in kept] == [(9, 21, 8), (9, 21, 12)]
    assert not any(p.requires_grad for p in kept)
    ids = torch.arange(9) // 2
    assert torch.equal(loss.contrast(loss.student_pyramids(student), kept, ids), loss(student, teacher, ids))


def test_tokens_and_maps_mix(backend: str) -> None:
    """A ViT student of a CNN: options of tokens do not affect maps."""
    loss, (student, teacher) = lfcc_loss(**TOKENS), features()
    student[0] = randn(9, 6, 6, 5)

    def as_tokens(x: Tensor, prefix: int) -> Tensor:
        return torch.cat([randn(len(x), prefix, x.shape[1]), x.flatten(2).transpose(1, 2)], 1)

    expected = loss(student, teacher)
    result = loss([as_tokens(student[0], 2), student[1]], [teacher[0], as_tokens(teacher[1], 1)])
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_features(backend: str, dtype: torch.dtype) -> None:
    """As under AMP; the float32 loss differs only by the rounding of the features."""
    loss, (student, teacher) = lfcc_loss(temperature=0.2), features(dtype)
    result = loss(student, teacher)
    expected = loss([x.detach().float() for x in student], [x.float() for x in teacher])
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=0.02)
    result.backward()
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in student)
    assert all(p.grad.dtype == torch.float32 for p in loss.parameters())


def test_autocast_leaves_the_loss_in_float32(backend: str) -> None:
    loss, (student, teacher) = lfcc_loss(), features()
    expected = loss(student, teacher)
    with torch.autocast(student[0].device.type, torch.bfloat16):
        result = loss(student, teacher)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected)


def test_float64(backend: str) -> None:
    loss, (student, teacher) = lfcc_loss().double(), features(torch.float64)
    result = loss(student, teacher)
    expected = torch.stack(list(written_out(loss, student, teacher).values())).mean()
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("teacher_filter", ["average", "gaussian", "dct"])
def test_state_dict_round_trip(backend: str, teacher_filter: str) -> None:
    options = {"learnable_temperature": True, "teacher_filter": teacher_filter}
    loss, other, (student, teacher) = lfcc_loss(**options), lfcc_loss(**options), features()
    with torch.no_grad():
        loss.info_nce.log_temperature += 1
    other.load_state_dict(loss.state_dict())
    assert torch.equal(loss(student, teacher), other(student, teacher))


@pytest.mark.slow_on("eager", "triton", "cuda")
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student", "symmetric"])
def test_compiled(backend: str, direction: str) -> None:
    torch._dynamo.reset()
    loss, (student, teacher) = lfcc_loss(direction=direction, learnable_temperature=True), features()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    learning = [*student, *loss.parameters()]
    expected, result = loss(student, teacher), compiled(student, teacher)
    torch.testing.assert_close(result, expected)
    grads = zip(torch.autograd.grad(result, learning), torch.autograd.grad(expected, learning), strict=True)
    for grad, same in grads:
        torch.testing.assert_close(grad, same)


def test_overfits_thirty_two_samples(backend: str) -> None:
    """From about log(32), that of chance, to almost 0 in few steps, because Triton's interpreter is slow."""
    loss, student = lk.LFCCLoss([16], [24]), randn(32, 16, 4, 4)
    teacher = torch.einsum("tc,bchw->bthw", randn(24, 16), student)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss([student], [teacher])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[0] == pytest.approx(math.log(32), abs=1.5)
    assert losses[-1] < 0.15


@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student", "symmetric"])
def test_info_nce_loss_is_the_function(backend: str, direction: str) -> None:
    student, teacher = randn(9, 5, requires_grad=True), randn(9, 5)
    ids = {"student_ids": torch.arange(9) // 2, "teacher_ids": torch.arange(9) // 2}
    fixed = lk.InfoNCELoss(0.3, direction)
    expected = lk.info_nce(student, teacher, temperature=0.3, direction=direction, **ids)
    assert fixed.temperature == 0.3 and not list(fixed.parameters())
    assert torch.equal(fixed(student, teacher, **ids), expected)

    learning = lk.InfoNCELoss(0.3, direction, learnable_temperature=True)
    assert learning.temperature.item() == pytest.approx(0.3)
    learning(student, teacher, **ids).backward()
    temperature = torch.tensor(0.3, requires_grad=True)
    lk.info_nce(student, teacher, temperature=temperature, direction=direction, **ids).backward()
    torch.testing.assert_close(learning.log_temperature.grad.squeeze(0), 0.3 * temperature.grad)
