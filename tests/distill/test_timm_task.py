"""LFCCTask against a Distiller, and in a loop like that of timm's train.py."""

import copy
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from gloo import in_ranks
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, dispatch_clip_grad
from torch import Tensor, nn

from lfcc_kernels.distill import Distiller, build_lfcc, create_extractor
from lfcc_kernels.distill.models import TeacherInput
from lfcc_kernels.distill.timm_task import LFCCTask

CLASSES, SIZE, IMAGES = 5, 32, 8


def create_student() -> nn.Module:
    return timm.create_model("test_vit", num_classes=CLASSES, img_size=SIZE, patch_size=8)


def create_teacher() -> nn.Module:
    """With another normalisation than the student."""
    overlay = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    return timm.create_model("test_resnet", num_classes=CLASSES, pretrained_cfg_overlay=overlay)


def create_task(seed: int = 0, **options) -> LFCCTask:
    torch.manual_seed(99)
    teacher = create_teacher()  # the same for every seed
    torch.manual_seed(seed)
    options = {"lfcc_options": {"scales": (1, 2)}, "student_taps": [1, 5], "teacher_taps": [2, 3]} | options
    return LFCCTask(create_student(), teacher, image_size=SIZE, verbose=False, **options)


def create_distiller(task: LFCCTask, **options: float) -> Distiller:
    """A Distiller with the task's weights."""
    student, teacher = copy.deepcopy(task.get_eval_model()), task.teacher.model
    to_teacher = TeacherInput(student, teacher, SIZE)
    student = create_extractor(student, [1, 5], image_size=SIZE)
    teacher = create_extractor(teacher, [2, 3], image_size=SIZE, preprocess=to_teacher)
    lfcc = build_lfcc(student, teacher, scales=(1, 2))
    lfcc.load_state_dict(task.get_task_state()["lfcc"])
    return Distiller(student, teacher, lfcc, **options)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(CLASSES, (IMAGES,), generator=generator)


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters()]


def check_same(task: LFCCTask, distiller: Distiller, target: Tensor, labels: Tensor, ids: Tensor | None) -> None:
    """The terms, the logits and the gradients of the two."""
    images, _ = batch()
    result = task(images, target)
    expected = distiller(images, labels, distiller.teach(images), ids)
    torch.testing.assert_close(result.pop("output"), expected.pop("logits"))
    torch.testing.assert_close(result, expected)
    result["loss"].backward()
    expected["loss"].backward()
    torch.testing.assert_close(gradients(task.trainable_module), gradients(distiller), rtol=1e-4, atol=1e-6)


def test_losses_and_gradients_are_those_of_a_distiller() -> None:
    task = create_task(alpha=0.5, beta=2.0, kd_temperature=3.0)
    _, labels = batch()
    check_same(task, create_distiller(task, alpha=0.5, beta=2.0, kd_temperature=3.0), labels, labels, None)


def test_criterion_replaces_cross_entropy() -> None:
    task = create_task(criterion=LabelSmoothingCrossEntropy(0.2))
    _, labels = batch()
    check_same(task, create_distiller(task, label_smoothing=0.2), labels, labels, None)


def test_images_mixed_by_timm_are_not_negatives_of_each_other() -> None:
    task = create_task()
    images, labels = batch()
    _, target = Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=CLASSES)(images, labels)
    check_same(task, create_distiller(task), target, target, torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]))


def train(task: LFCCTask, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """Runs updates like timm's train.py; returns the losses."""
    task.train()
    losses = []
    for step in range(first, last):
        loss = task(*batch(step))["loss"]
        loss.backward()
        dispatch_clip_grad(task.get_clip_parameters(), value=1.0)
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step + 1)
        losses.append(loss.item())
    return losses


def create_training(seed: int = 0) -> tuple[LFCCTask, torch.optim.Optimizer]:
    task = create_task(seed)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=1e-2)
    task.setup_ema(decay=0.5)
    return task, optimizer


def test_a_loop_trains_student_and_projections_and_their_average() -> None:
    task, optimizer = create_training()
    started = copy.deepcopy(task)
    assert task.trainable_module_ema.module.teacher is None  # otherwise it would be copied
    train(task, optimizer, 0, 2)
    assert not task.teacher.training and task.trainable_module.training
    for (name, now), then in zip(task.teacher.state_dict().items(), started.teacher.state_dict().values(), strict=True):
        assert torch.equal(now, then), name
    for of in (lambda task: task.get_eval_model(), lambda task: task.trainable_module.lfcc.student_projections):
        for now, then in zip(of(task).parameters(), of(started).parameters(), strict=True):
            assert now.isfinite().all() and not torch.equal(now, then)
    averaged = task.get_eval_model(ema=True).head.weight
    assert not torch.equal(averaged, task.get_eval_model().head.weight)
    assert not torch.equal(averaged, started.get_eval_model().head.weight)


def test_clip_parameters_with_and_without_the_head() -> None:
    task = create_task()
    student, lfcc = task.get_eval_model(), task.trainable_module.lfcc
    everything = {*student.parameters(), *lfcc.parameters()}
    assert set(task.get_clip_parameters()) == everything
    assert set(task.get_clip_parameters(exclude_head=True)) == everything - set(student.head.parameters())


def test_resuming_a_checkpoint_of_timm(tmp_path: Path) -> None:
    task, optimizer = create_training()
    train(task, optimizer, 0, 2)
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), task=task
    )
    saver.save_checkpoint(epoch=0)
    path = str(tmp_path / "last.pth.tar")
    saved = torch.load(path)
    assert list(saved["state_dict"]) == list(saved["state_dict_ema"]) == list(create_student().state_dict())

    other, other_optimizer = create_training(seed=1)
    resume_task_checkpoint(other, path, other_optimizer)
    load_task_ema_checkpoint(other, path)
    assert train(other, other_optimizer, 2, 4) == train(task, optimizer, 2, 4)
    torch.testing.assert_close(other.get_checkpoint_state(ema=True), task.get_checkpoint_state(ema=True))


@pytest.mark.slow
def test_compiled_task_has_the_same_results_and_keys() -> None:
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(module)
        return module.forward

    task = create_task()
    images, labels = batch()
    expected, keys = task(images, labels), list(task.get_checkpoint_state()["state_dict"])
    compiled = task.compile(backend=backend)
    torch.testing.assert_close(task(images, labels), expected)
    assert len(graphs) == 4  # teacher, student, its pooling, the losses
    assert task.get_eval_model() is compiled
    torch.testing.assert_close(compiled(images), expected["output"])
    assert len(graphs) == 5
    assert list(task.get_checkpoint_state()["state_dict"]) == keys


def distributed_targets() -> dict[str, Tensor]:
    """Class labels, and probabilities as from mixup on each of two ranks."""
    torch.manual_seed(2)
    return {"hard": batch()[1], "soft": torch.rand(IMAGES, CLASSES).softmax(1)}


def gradients_of_a_rank() -> dict[str, list]:
    task = create_task().prepare_distributed()
    mine = slice(dist.get_rank() * IMAGES // 2, (dist.get_rank() + 1) * IMAGES // 2)
    found = {"keys": list(task.get_checkpoint_state()["state_dict"])}
    for name, target in distributed_targets().items():
        task.zero_grad()
        task(batch()[0][mine], target[mine])["loss"].backward()
        found[name] = [grad.clone() for grad in gradients(task.trainable_module)]
    task.zero_grad()
    with task.no_sync():
        task(batch()[0][mine], batch()[1][mine])["loss"].backward()
    return found | {"no_sync": gradients(task.trainable_module)}


@pytest.mark.slow
def test_two_ranks_have_the_gradient_of_one_process(tmp_path: Path) -> None:
    ranks = in_ranks(2, tmp_path, gradients_of_a_rank)
    task = create_task()
    images, mirrors = batch()[0], {"hard": None, "soft": torch.tensor([0, 1, 1, 0, 2, 3, 3, 2])}
    for name, target in distributed_targets().items():
        distiller = create_distiller(task)
        distiller(images, target, distiller.teach(images), mirrors[name])["loss"].backward()
        for rank in ranks:
            torch.testing.assert_close(rank[name], gradients(distiller), rtol=1e-3, atol=1e-6)
    one, other = (rank["no_sync"] for rank in ranks)
    assert not any(torch.allclose(*pair) for pair in zip(one, other, strict=True) if pair[0].any())
    assert ranks[0]["keys"] == list(create_student().state_dict())


def test_an_unknown_teacher_raises() -> None:
    with pytest.raises(ValueError, match=r"timm .* has no model 'resnet_of_tomorrow'"):
        LFCCTask(create_student(), "resnet_of_tomorrow", image_size=SIZE)


def test_a_timm_without_tasks_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.task", None)
    monkeypatch.delitem(sys.modules, "lfcc_kernels.distill.timm_task")
    with pytest.raises(ImportError, match=r"timm .* is installed but LFCCTask needs .* timm 1\.0\.27 or newer"):
        runpy.run_module("lfcc_kernels.distill.timm_task")
