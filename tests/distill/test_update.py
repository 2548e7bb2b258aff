"""Updates of several batches (GradCache) against one large batch, and against one autograd graph."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn
from toy_runs import CLASSES, SETTINGS, make_distiller

from lfcc_kernels.distill import Batch, Distiller, build_lfcc, create_extractor
from lfcc_kernels.distill.loop import create_training_state
from lfcc_kernels.distill.metrics import StepTimer
from lfcc_kernels.distill.update import update

# The first step of plain SGD is the gradient, so the change of the weights gives it.
GRADIENTS = replace(
    SETTINGS, opt="momentum", momentum=0, lr=1.0, weight_decay=0, clip_grad=None, sched="none", model_ema=False
)
TIMER = StepTimer(torch.device("cpu"))


def distiller_of(student: str, direction: str = "student_to_teacher", dropout: float = 0.0) -> Distiller:
    torch.manual_seed(0)
    options = {"proj_drop_rate": dropout, "img_size": 32, "patch_size": 8} if student == "test_vit" else {}
    extractor = create_extractor(timm.create_model(student, num_classes=CLASSES, **options), [1, 3], image_size=32)
    teacher = create_extractor(timm.create_model("test_resnet", num_classes=CLASSES), [2, 3], image_size=32)
    lfcc = build_lfcc(extractor, teacher, scales=(1, 2), learnable_temperature=True, direction=direction)
    return Distiller(extractor, teacher, lfcc, label_smoothing=0.1)


def batch_of(size: int = 8, labelled: int = 5, ids: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    labels[labelled:] = -100
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return Batch(images, labels, None, torch.arange(size) // 2 if ids else None)


def split(batch: Batch, parts: int) -> list[Batch]:
    pieces = zip(
        batch.images.chunk(parts),
        batch.labels.chunk(parts),
        batch.ids.chunk(parts) if batch.ids is not None else [None] * parts,
        strict=True,
    )
    return [Batch(images, labels, None, ids) for images, labels, ids in pieces]


def gradients(distiller: Distiller, batches: list[Batch], **settings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms of one update and the gradient of every parameter."""
    state = create_training_state(distiller, 4, replace(GRADIENTS, **settings))
    before = {name: p.detach().clone() for name, p in distiller.named_parameters()}
    terms = update(state, batches, replace(GRADIENTS, **settings), TIMER)
    return terms, {name: before[name] - p.detach() for name, p in distiller.named_parameters()}


# Logit KD is a small difference of logarithms around 2, times the squared temperature; float32 rounds each logarithm.
KD_ERROR = 1e-6


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 2e-5) -> None:
    for name in expected:
        error, scale = (found[name] - expected[name]).abs().max(), expected[name].abs().max()
        atol = KD_ERROR if name == "kd" else 1e-7
        assert error <= rtol * scale + atol, f"{name} is off by {error / scale:.1e}"


@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student", "symmetric"])
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("ids", [False, True])
def test_batches_together_equal_the_large_batch(direction: str, parts: int, ids: bool) -> None:
    distiller, batch = distiller_of("test_vit", direction), batch_of(ids=ids)
    expected = gradients(copy_of(distiller), [batch])
    found = gradients(copy_of(distiller), split(batch, parts))
    for result, same in zip(found, expected, strict=True):
        assert_same(result, same)


def test_plain_accumulation_does_not() -> None:
    """The mean over batches contrasted one by one is another loss."""
    distiller, batch = distiller_of("test_vit"), batch_of()
    _, expected = gradients(copy_of(distiller), [batch])
    plain = [gradients(copy_of(distiller), [part])[1] for part in split(batch, 4)]
    name = "lfcc.student_projections.0.weight"
    mean = torch.stack([part[name] for part in plain]).mean(0)
    assert (mean - expected[name]).norm() > 0.1 * expected[name].norm()


def copy_of(distiller: Distiller) -> Distiller:
    copied = copy.deepcopy(distiller)
    object.__setattr__(copied, "teacher", distiller.teacher)
    return copied


def test_both_passes_have_the_same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller, batch = distiller_of("test_vit", dropout=0.3), batch_of(labelled=8)
    parts = split(batch, 2)

    # One graph over both batches, with the random numbers of the first pass in the same order.
    reference = copy_of(distiller).train()
    torch.manual_seed(7)
    outputs = [reference(part.images) for part in parts]
    teachers = [reference.teach(part.images) for part in parts]
    lfcc = reference.lfcc.contrast(
        [torch.cat(stage) for stage in zip(*(output.pyramids for output in outputs), strict=True)],
        [torch.cat(stage) for stage in zip(*(teacher.pyramids for teacher in teachers), strict=True)],
    )
    labels = torch.cat([part.labels for part in parts])
    logits = torch.cat([output.logits for output in outputs])
    kd = nn.functional.kl_div(
        (logits / 4).log_softmax(1),
        (torch.cat([teacher.logits for teacher in teachers]) / 4).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1) + 16 * kd + lfcc
    loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}

    torch.manual_seed(7)
    terms, found = gradients(distiller.train(), parts)
    assert_same(found, expected)
    assert_same(terms, {"loss": loss.detach(), "lfcc": lfcc.detach()})


def test_generator_advances_as_in_one_pass() -> None:
    distiller, parts = distiller_of("test_vit", dropout=0.3).train(), split(batch_of(), 2)
    torch.manual_seed(7)
    for part in parts:
        distiller(part.images)
    expected = torch.rand(3)
    torch.manual_seed(7)
    gradients(distiller, parts)
    assert torch.equal(torch.rand(3), expected)


def test_statistics_of_batchnorm_advance_once() -> None:
    distiller, parts = distiller_of("test_resnet").train(), split(batch_of(), 2)
    once = copy_of(distiller)
    for part in parts:
        once(part.images)
    gradients(distiller, parts)
    for (name, found), expected in zip(distiller.named_buffers(), once.buffers(), strict=True):
        assert torch.equal(found, expected), name
    assert {value.item() for name, value in distiller.named_buffers() if name.endswith("tracked")} == {2}
    assert all(norm.track_running_stats for norm in distiller.modules() if isinstance(norm, nn.BatchNorm2d))


def test_forward_passes_of_teacher_and_student() -> None:
    distiller, passes = distiller_of("test_vit"), []
    for side in (distiller.teacher, distiller.student):
        side.register_forward_hook(lambda module, args, outputs: passes.append(module is distiller.teacher))
    gradients(distiller, split(batch_of(), 4))
    assert passes.count(True) == 4 and passes.count(False) == 8
    passes.clear()
    gradients(distiller, [batch_of()])
    assert passes.count(True) == 1 == passes.count(False)


def test_without_lfcc_one_pass_is_enough() -> None:
    batch, passes = batch_of(), []
    distiller = make_distiller(beta=0)
    expected = gradients(copy_of(distiller.eval()), [batch])
    distiller.student.register_forward_hook(lambda *args: passes.append(1))
    found = gradients(distiller, split(batch, 2))
    assert len(passes) == 2
    for result, same in zip(found, expected, strict=True):
        assert_same(result, same)


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_mixed_precision(amp_dtype: str) -> None:
    distiller, batch = distiller_of("test_vit"), batch_of()
    _, exact = gradients(copy_of(distiller), split(batch, 2))
    terms, found = gradients(distiller, split(batch, 2), amp=True, amp_dtype=amp_dtype)
    assert terms["lfcc"].dtype == torch.float32
    name = "lfcc.student_projections.0.weight"
    assert (found[name] - exact[name]).norm() < 0.05 * exact[name].norm()


def test_gradients_in_float16_are_clipped_without_their_loss_scale() -> None:
    distiller, batch, clip = distiller_of("test_vit"), batch_of(), 0.01
    terms, exact = gradients(copy_of(distiller), [batch], clip_grad=clip)
    assert terms["grad_norm"] > 10 * clip
    scaled, found = gradients(distiller, [batch], clip_grad=clip, amp=True, amp_dtype="float16")  # a scale of 65536
    assert scaled["grad_norm"] == pytest.approx(terms["grad_norm"].item(), rel=0.02)
    steps = torch.cat([step.flatten() for step in found.values()])
    expected = torch.cat([step.flatten() for step in exact.values()])
    assert steps.norm().item() == pytest.approx(clip, rel=1e-3)
    assert (steps - expected).norm() < 0.05 * clip


def test_probabilities_as_labels() -> None:
    distiller, batch = distiller_of("test_vit"), batch_of()
    soft = batch._replace(labels=torch.rand(8, CLASSES).softmax(1))
    terms, _ = gradients(copy_of(distiller), [soft])
    logits = distiller(soft.images).logits
    torch.testing.assert_close(terms["ce"], -(soft.labels * logits.log_softmax(1)).sum(1).mean().detach())
    halves = [Batch(*(x.chunk(2)[half] for x in soft[:2])) for half in (0, 1)]
    assert_same(gradients(copy_of(distiller), halves)[1], gradients(distiller, [soft])[1])


@pytest.mark.slow
def test_student_and_loss_compile_without_graph_breaks() -> None:
    distiller, batch = distiller_of("test_vit"), batch_of(ids=True)
    expected = gradients(copy_of(distiller), [batch])
    distiller.compile(backend="aot_eager")
    for batches in ([batch], split(batch, 2)):
        found = gradients(distiller, batches)
        for result, same in zip(found, expected, strict=True):
            assert_same(result, same)
        with torch.no_grad():
            for name, p in distiller.named_parameters():
                p.add_(found[1][name])


def test_channels_last_changes_the_layout_only() -> None:
    distiller, layouts = distiller_of("test_resnet"), []
    expected = gradients(copy_of(distiller), [batch_of()])
    for side in (distiller.student, distiller.teacher):
        side.model.layer2.register_forward_hook(
            lambda module, args, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    found = gradients(distiller, [batch_of()], channels_last=True)
    assert layouts == [True, True]
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1], rtol=1e-3)
