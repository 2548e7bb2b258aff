"""`info_nce` agrees with other libraries that define the same loss."""

import pytest
import torch

import lfcc_kernels as lk


def pairs(rows: int = 37, dim: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = torch.randn(2, rows, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return student.requires_grad_(), teacher.requires_grad_()


def assert_same_with_gradients(lfcc: torch.Tensor, expected: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(lfcc, expected, rtol=1e-9, atol=1e-12)
    lfcc, expected = (torch.autograd.grad(loss, inputs) for loss in (lfcc, expected))
    torch.testing.assert_close(lfcc, expected, rtol=1e-8, atol=1e-12)


def test_symmetric_is_clip_loss_of_open_clip(backend: str) -> None:
    clip = pytest.importorskip("open_clip.loss")
    student, teacher = pairs()
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (student, teacher)]
    lfcc = lk.info_nce(student, teacher, temperature=0.07, direction="symmetric")
    assert_same_with_gradients(lfcc, clip.ClipLoss()(*unit, 1 / 0.07), (student, teacher))


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_one_way_is_the_loss_of_pytorch_metric_learning(backend: str, name: str) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    student, teacher = pairs()
    labels = torch.arange(len(student))  # each row's only positive is its own teacher
    expected = getattr(losses, name)(temperature=0.1)(student, labels, ref_emb=teacher, ref_labels=labels.clone())
    lfcc = lk.info_nce(student, teacher, temperature=0.1)
    assert_same_with_gradients(lfcc, expected, (student, teacher))
