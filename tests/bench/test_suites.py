"""The suites lfcc, scaling and step: their shapes are those of timm's models, and their candidates agree with eager."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lfcc_kernels.bench import ofa, targets
from lfcc_kernels.bench.cases import Case, lfcc, scaling, step
from lfcc_kernels.bench.machine import Cpu, Cuda, Machine

SUITES = {"lfcc": lfcc.cases, "scaling": scaling.cases, "step": step.cases}
CIFAR_100 = {
    ("swin_t", "vit_s", "mixer_b16"): ("resnet18", "mobilenetv2"),
    ("convnext_t", "mixer_b16"): ("deit_t", "swin_p"),
    ("convnext_t", "swin_t"): ("resmlp_12",),
}
IMAGENET = {
    ("deit_t", "swin_t", "mixer_b16"): ("resnet18", "mobilenetv2"),
    ("resnet50", "convnext_t", "mixer_b16"): ("deit_t", "swin_n"),
    ("resnet50", "convnext_t", "swin_t"): ("resmlp_12",),
}
NARROW = {
    "swin_n": {"embed_dim": 64, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16)},
    "swin_p": {"embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24)},
}


def tiny(suite: str) -> list[Case]:
    return list({case.name: case for case in SUITES[suite](Cpu("tiny"), None)}.values())


def named(case: Case) -> str:
    return case.name


def in_float64(case: Case, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    """Result and gradients of eager."""
    inputs = tuple(x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs)
    return case.run(case.candidates["eager"], inputs, upstream.double())


def test_pairs_are_those_of_ofa_kd() -> None:
    pairs = [
        {(student, teacher) for teachers, students in table.items() for teacher in teachers for student in students}
        for table in (CIFAR_100, IMAGENET)
    ]
    assert [len(some) for some in pairs] == [12, 15]
    assert set(ofa.PAIRS) == pairs[0] | pairs[1]
    assert len(ofa.PAIRS) == 19


@pytest.mark.parametrize("name", ofa.MODELS)
def test_stages_are_those_of_timm(name: str) -> None:
    """In shape and strides. For Swin the outputs of the stages, because timm returns contiguous copies as maps."""
    timm = pytest.importorskip("timm")
    from lfcc_kernels.distill import create_extractor

    model = ofa.MODELS[name]
    taps = [f"layers.{stage}" for stage in range(4)] if "swin" in name else None
    with torch.device("meta"), torch.no_grad():
        extractor = create_extractor(timm.create_model(model.timm, **NARROW.get(name, {})).eval(), taps)
        _, expected = extractor(torch.zeros(2, 3, 224, 224))
    maps = lfcc.as_maps(model, lfcc.stage_features(Cpu(), model, 2, False, torch.float32))
    assert [x.shape for x in maps] == [x.shape for x in expected]
    assert [x.stride()[1:] for x in maps] == [x.stride()[1:] for x in expected]
    assert {tap.prefix_tokens for tap in extractor.taps} == {model.prefix_tokens}


@pytest.mark.parametrize("device", [Cpu, Cuda])
@pytest.mark.parametrize("suite", SUITES)
def test_cases_are_listed_without_a_device(suite: str, device: type[Machine]) -> None:
    """Names are unique, tiny and full cases have the same order, and a requested dtype applies to all."""
    make = SUITES[suite]
    full, tiny = (make(device(size), None) for size in ("full", "tiny"))
    assert len({case.name for case in full}) == len(full)
    assert [(c.label, c.mode, c.axis, c.x) for c in tiny] == [(c.label, c.mode, c.axis, c.x) for c in full]
    assert {case.dtype for case in make(device(), torch.float16)} == {torch.float16}


def test_targets_find_their_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    requested = set()

    class Recorder(dict):
        def __missing__(self, key: tuple[str, str]) -> None:
            requested.add(key[0])
            raise LookupError

    for target in targets.TARGETS:
        with pytest.raises(LookupError):
            target.measure(Recorder())
    requested = {case for case in requested if case.split("-")[0] in SUITES}
    assert requested
    listed = {case.name for make in SUITES.values() for case in make(Cpu(), None)}
    assert requested <= listed


@pytest.mark.parametrize(
    "case", [case for suite in ("lfcc", "scaling") for case in tiny(suite) if case.axis != "ranks"], ids=named
)
def test_candidates_agree_with_eager(case: Case) -> None:
    inputs = case.inputs()
    upstream = torch.ones_like(case.candidates["eager"](*inputs))
    expected = in_float64(case, inputs, upstream)
    for name, call in case.candidates.items():
        if not name.startswith("compiled"):
            for got, right in zip(case.run(call, inputs, upstream), expected, strict=True):
                torch.testing.assert_close(got.double(), right.double(), rtol=1e-3, atol=1e-6, msg=name)


@pytest.fixture(scope="module", params=tiny("step"), ids=named)
def training(request: pytest.FixtureRequest) -> Iterator[Case]:
    pytest.importorskip("timm")
    yield request.param
    request.param.close()


def test_steps_agree_with_eager_and_change_no_weight(training: Case) -> None:
    inputs = training.inputs()
    student = training.learner(torch.float32).distiller.student
    before = [p.clone() for p in student.parameters()]
    expected = in_float64(training, inputs, torch.tensor(1.0))
    for name, call in training.candidates.items():
        for got, right in zip(training.run(call, inputs, None), expected, strict=True):
            assert (got.double() - right).abs().max() <= 1e-4 * right.abs().max(), name
    assert all(map(torch.equal, before, student.parameters()))
    assert all(p.grad is None for p in student.parameters())


def test_baseline_runs_both_models_without_the_loss(training: Case) -> None:
    images, labels = training.inputs()
    distiller = training.learner(torch.float32).distiller
    calls = []
    stem = next(module for module in distiller.teacher.modules() if isinstance(module, torch.nn.Conv2d))
    hook = stem.register_forward_hook(lambda *_: calls.append(1))
    loss, *gradients = training.run(training.baseline, (images, labels), None)
    hook.remove()
    assert calls == [1]
    torch.testing.assert_close(loss, F.cross_entropy(distiller.student.model(images), labels))
    assert len(gradients) == sum(p.dim() > 1 for p in distiller.student.parameters())


def test_close_frees_the_models(training: Case) -> None:
    model = weakref.ref(training.learner(torch.float32).distiller)
    training.close()
    gc.collect()
    assert model() is None
