"""`Distiller`: losses, gradients, precision, compilation and errors."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn
from toy_runs import CLASSES, make_distiller

from lfcc_kernels.distill import Distiller, TeacherOutputs, build_lfcc, create_extractor

IMAGES, LABELS = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, -100, 1, -100])


def test_loss_is_the_weighted_sum_of_its_formulas() -> None:
    distiller = make_distiller(alpha=0.5, beta=0.25).eval()
    outputs = distiller.teach(IMAGES)
    terms = distiller(IMAGES, LABELS, outputs)

    logits, features = distiller.student(IMAGES)
    teacher_logits, teacher_features = distiller.teacher(IMAGES)
    student_p, teacher_p = (F.softmax(z.double() / 4, dim=1) for z in (logits, teacher_logits))
    kd = 16 * (teacher_p * (teacher_p / student_p).log()).sum(1).mean()
    torch.testing.assert_close(terms["kd"], kd.float())
    labelled = LABELS != -100
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits[labelled], LABELS[labelled]))
    torch.testing.assert_close(terms["lfcc"], distiller.lfcc(features, teacher_features))
    torch.testing.assert_close(terms["loss"], terms["ce"] + 0.5 * terms["kd"] + 0.25 * terms["lfcc"])


def test_a_batch_without_labels_has_no_cross_entropy() -> None:
    distiller = make_distiller()
    terms = distiller(IMAGES, torch.full((6,), -100), distiller.teach(IMAGES))
    assert terms["ce"] == 0
    terms["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in distiller.parameters())


def test_a_term_of_weight_zero_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "kl_div", None)
    no_kd = make_distiller(alpha=0)
    assert no_kd.teach(IMAGES).logits is None
    assert no_kd(IMAGES, LABELS, no_kd.teach(IMAGES)).keys() == {"logits", "loss", "ce", "lfcc"}
    monkeypatch.undo()

    no_lfcc = make_distiller(beta=0)
    assert no_lfcc.lfcc is None and no_lfcc.teach(IMAGES).pyramids is None
    assert no_lfcc(IMAGES, LABELS, no_lfcc.teach(IMAGES)).keys() == {"logits", "loss", "ce", "kd"}

    labels_only = make_distiller(alpha=0, beta=0)
    monkeypatch.setattr(labels_only.teacher, "forward", None)
    assert labels_only(IMAGES, LABELS, labels_only.teach(IMAGES)).keys() == {"logits", "loss", "ce"}


def test_the_teacher_is_frozen_and_not_a_submodule() -> None:
    distiller = make_distiller().train()
    assert not distiller.teacher.training and distiller.student.training
    assert not any("teacher." in name for name in distiller.state_dict())
    parameters = {id(p) for p in distiller.parameters()}
    assert not any(p.requires_grad or id(p) in parameters for p in distiller.teacher.parameters())
    assert not distiller.teach(IMAGES).logits.requires_grad


def test_every_parameter_gets_a_gradient_and_weight_decay() -> None:
    distiller = make_distiller()
    distiller(IMAGES, LABELS, distiller.teach(IMAGES))["loss"].backward()
    assert {name for name, p in distiller.named_parameters() if p.grad is None} == set()
    optimizer = create_optimizer_v2(distiller, opt="adamw", lr=1e-3, weight_decay=0.1)
    optimized = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decay = {name: optimized[id(p)] for name, p in distiller.named_parameters()}
    assert decay["lfcc.student_projections.0.weight"] == 0.1 == decay["student.model.head.weight"]
    assert decay["student.model.pos_embed"] == 0 == decay["lfcc.info_nce.log_temperature"]
    assert decay["student.model.norm.weight"] == 0 == decay["student.model.head.bias"]


def test_the_loss_is_float32_under_autocast() -> None:
    distiller = make_distiller().eval()
    exact = distiller(IMAGES, LABELS, distiller.teach(IMAGES))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = distiller(IMAGES, LABELS, distiller.teach(IMAGES))
    for name in ("loss", "ce", "kd", "lfcc"):
        term = terms[name]
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, exact[name], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1}, "alpha is -1, expected a finite number >= 0"),
        ({"beta": float("nan")}, "beta is nan, expected"),
        ({"kd_temperature": 0}, "kd_temperature is 0, expected"),
        ({"beta": 1}, "beta is 1 but lfcc is None"),
    ],
)
def test_invalid_arguments_raise(options: dict, message: str) -> None:
    student = create_extractor(timm.create_model("test_resnet", num_classes=CLASSES), [], image_size=32)
    with pytest.raises(ValueError, match=message):
        Distiller(student, **{"beta": 0} | options)


def test_invalid_teacher_outputs_raise() -> None:
    distiller = make_distiller()
    with pytest.raises(ValueError, match=r"student logits are \(6, 3\) but teacher logits are \(6, 7\)"):
        distiller(IMAGES, LABELS, TeacherOutputs(torch.zeros(6, 7), distiller.teach(IMAGES).pyramids))
    orphan = Distiller(distiller.student, None, distiller.lfcc)
    with pytest.raises(RuntimeError, match="has no teacher"):
        orphan.teach(IMAGES)
    assert orphan(IMAGES, LABELS, distiller.teach(IMAGES))["lfcc"] > 0


def test_taps_that_do_not_match_raise() -> None:
    def extractor(taps: list[int]) -> nn.Module:
        return create_extractor(timm.create_model("test_resnet"), taps, image_size=32)

    with pytest.raises(ValueError, match="the student has 1 taps but the teacher has 2: set equally many"):
        build_lfcc(extractor([1]), extractor([1, 2]))
    with pytest.raises(ValueError, match="teacher tap 4 has a grid of 1 x 1, smaller than scale 2"):
        build_lfcc(extractor([1]), extractor([4]), scales=(1, 2))


def test_only_forward_uses_parameters_with_gradient() -> None:
    """DDP and FSDP synchronise `forward` only."""
    distiller = make_distiller()
    outputs = distiller.teach(IMAGES)
    assert not any(pyramid.requires_grad for pyramid in (outputs.logits, *outputs.pyramids))
    cached = distiller.cache_gradients([distiller(IMAGES).pyramids], [outputs.pyramids], None)
    assert not any(gradient.requires_grad for gradient in cached[0].pyramids)
    assert all(p.grad is None for p in distiller.parameters())


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("test_resnet", [2, 3]),
        ("test_vit", [2, 5]),
        ("test_convnext", [1, 2]),
        ("test_efficientnet", [2, 3]),
        ("test_vit", ["blocks.1", "blocks.4"]),
        ("test_resnet", ["layer2", "layer3"]),
    ],
    ids=str,
)
def test_students_compile_without_graph_breaks(name: str, taps: list) -> None:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8} if "vit" in name else {}
    student = create_extractor(timm.create_model(name, num_classes=CLASSES, **options), taps, image_size=32)
    teacher = make_distiller().teacher
    distiller = Distiller(student, teacher, build_lfcc(student, teacher, scales=(1, 2))).eval()
    keys, outputs = list(distiller.state_dict()), distiller.teach(IMAGES)
    expected = distiller(IMAGES, LABELS, outputs)
    expected["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in distiller.named_parameters()}
    distiller.zero_grad()

    distiller.compile(backend="aot_eager")  # fullgraph, so a graph break raises
    found = distiller(IMAGES, LABELS, outputs)
    found["loss"].backward()
    for term in expected:
        torch.testing.assert_close(found[term], expected[term])
    for name, p in distiller.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    assert list(distiller.state_dict()) == keys  # no _orig_mod
