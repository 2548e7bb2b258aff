"""`lfcc distill` and `lfcc inspect`."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
import yaml

from lfcc_kernels.cli import main
from lfcc_kernels.distill import build, command, load_checkpoint, loop, read_csv
from lfcc_kernels.distill.checkpoint import save_checkpoint
from lfcc_kernels.distill.config import as_config, create_parser

DIGITS = "distill --dataset digits --img-size 32 --batch-size 128 --workers 0 --no-aug"
STUDENT = "--student test_vit --student-kwargs patch_size=8 --student-taps 0 2 5"
TEACHER = "--teacher test_resnet --teacher-taps 1 2 3 --lfcc-scales 1 2"


def lfcc(words: str) -> int:
    return main(words.split())


def distill(folder: Path, options: str) -> int:
    return lfcc(f"{DIGITS} {STUDENT} {TEACHER} --output {folder} {options}")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run without a teacher."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    options = "--student test_resnet --kd-alpha 0 --lfcc-beta 0 --epochs 4 --lr 5e-3 --warmup-epochs 1"
    assert lfcc(f"{DIGITS} {options} --output {folder} --experiment teacher") == 0
    return folder / "teacher/checkpoints/best.pt"


def test_a_whole_distillation(tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture) -> None:
    options = f"--teacher-checkpoint {teacher} --epochs 4 --lr 2e-3 --clip-grad 1 --warmup-epochs 0 --model-ema"
    run = tmp_path / "digits"
    assert distill(tmp_path, f"{options} --model-ema --experiment digits") == 0
    output = capsys.readouterr().out
    assert ", cpu, float32" in output and "teacher  top1 " in output and "epoch 4" in output

    rows = read_csv(run / "summary.csv")
    teacher_top1 = float(output.split("teacher  top1 ")[1].split()[0])
    assert teacher_top1 > 60 and rows[-1]["top1"] > 25 and rows[-1]["loss"] < rows[0]["loss"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (
        config["student_kwargs"] == {"patch_size": 8}
        and config == load_checkpoint(run / "checkpoints/last.pt")["config"]
    )
    versions = json.loads((run / "versions.json").read_text())
    assert versions["torch"] == torch.__version__ and "eager" in versions["backends"]

    assert lfcc(f"distill --resume latest --output {tmp_path}") == 0  # finished: nothing to do
    assert read_csv(run / "summary.csv") == rows


def test_resume_from_the_command_line(tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture) -> None:
    options = f"--teacher-checkpoint {teacher} --teacher-img-size 40 --epochs 1 --checkpoint-interval 3"
    assert distill(tmp_path, f"{options} --experiment straight") == 0

    class Killed(BaseException):
        pass

    def save_and_die(path: Path, state: dict) -> None:
        save_checkpoint(path, state)
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "save_checkpoint", save_and_die)
        distill(tmp_path, f"{options} --experiment broken")
    assert lfcc(f"distill --resume {tmp_path}/broken") == 0
    straight, resumed = (load_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("straight", "broken"))
    for name, value in straight["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name

    capsys.readouterr()
    assert lfcc(f"distill --resume {tmp_path}/broken --lr 1") == 1
    assert "--lr is 1.0 but the checkpoint has 0.0005: omit the option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "free"), [("folder", True), ("hfds/x", True), ("wds/x", False), ("hfids/x", False)]
)
def test_streams_are_resumed_with_the_same_number_of_workers(dataset: str, free: bool) -> None:
    started, resumed = (
        as_config(create_parser().parse_args(f"--dataset {dataset} -j {workers}".split())) for workers in (2, 4)
    )
    with nullcontext() if free else pytest.raises(ValueError, match="--workers is 4 but the checkpoint has 2"):
        command._require_same_run(resumed, started)


def test_the_teacher_gets_images_of_its_own_size(teacher: Path) -> None:
    args = create_parser().parse_args(
        f"--teacher test_resnet --teacher-checkpoint {teacher} --teacher-img-size 64".split()
    )
    extractor = build.create_teacher(args, timm.create_model("test_vit"), classes=10, image_size=32)
    _, features = extractor(torch.randn(2, 3, 32, 32))
    assert [tuple(map.shape[2:]) for map in features] == [(16, 16), (8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dataset folder --data-dir nowhere", "nowhere"),
        ("--student resnet_of_nobody", "has no model 'resnet_of_nobody'; did you mean"),
        ("--student-kwargs colour=red", "timm.create_model('test_vit') failed: "),
        ("--teacher nobody", "has no model 'nobody'"),
        ("--teacher-checkpoint nowhere.pt", "--teacher-checkpoint nowhere.pt does not exist"),
        ("--teacher-checkpoint {tmp}/text.pt", "text.pt is damaged or not a checkpoint"),
        ("--teacher test_vit", "best.pt does not match test_vit"),
        ("--teacher-checkpoint {tmp}/five.pt", "the teacher has 5 classes but digits has 10"),
        ("--teacher-taps 1 2", "the student has 3 taps but the teacher has 2"),
        ("--teacher-taps 1 2 9", "ResNet has no tap 9, expected 0 to 4"),
        ("--lfcc-scales 1 4", "teacher tap 3 has a grid of 2 x 2, smaller than scale 4"),
        ("--lfcc-temperature 0", "temperature is 0.0; expected a positive"),
        ("--kd-alpha -1", "alpha is -1.0, expected a finite number >= 0"),
        ("--device abacus", "--device abacus cannot be used"),
        ("--opt magic", "magic"),
        ("-b 5000", "training set is smaller than one update"),
        ("--config nowhere.yaml", "--config nowhere.yaml does not exist"),
        ("--experiment taken", "taken is not empty: choose another --experiment"),
        ("--resume latest", "--resume latest: no checkpoint in"),
        ("--resume nowhere.pt", "no checkpoint at"),
        ("--resume {tmp}/text.pt", "text.pt is not in a run folder"),
        ("--resume {tmp}/taken", "last.pt is damaged or not a PyTorch checkpoint"),
    ],
)
def test_user_errors_are_one_line_and_change_nothing(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture, options: str, message: str
) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "five.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "taken/checkpoints").mkdir(parents=True)
    (tmp_path / "taken/checkpoints/last.pt").write_text("precious, but no checkpoint")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    words = f"--teacher-checkpoint {teacher} --epochs 1 --experiment new {options.format(tmp=tmp_path)}"
    code = distill(tmp_path, words)
    captured = capsys.readouterr()
    assert code == 1 and captured.err.startswith("lfcc: error: ") and message in captured.err
    assert captured.err.count("\n") == 1
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_required_options(capsys: pytest.CaptureFixture) -> None:
    assert lfcc("distill") == 1
    assert "--student is required: name a timm model" in capsys.readouterr().err
    assert lfcc(f"{DIGITS} {STUDENT}") == 1
    assert "--teacher is required: name a timm model" in capsys.readouterr().err


def test_different_classes_of_the_splits_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    opened = build.open_dataset

    def fewer(name: str, root: str, split: str, **options):
        dataset = opened(name, root, split, **options)
        dataset.classes = dataset.classes[:9] if split == "val" else dataset.classes
        return dataset

    monkeypatch.setattr(build, "open_dataset", fewer)
    assert lfcc(f"{DIGITS} --student test_resnet --kd-alpha 0 --lfcc-beta 0 --epochs 1 --output {tmp_path}") == 1
    assert "the training split has 10 classes but the validation split has 9 other ones" in capsys.readouterr().err


def test_exit_code_without_a_traceback() -> None:
    words = [sys.executable, "-m", "lfcc_kernels.cli", "distill", "--resume", "nowhere.pt"]
    process = subprocess.run(words, capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr.startswith("lfcc: error: no checkpoint at ")
    assert process.stderr.count("\n") == 1


def test_inspect(capsys: pytest.CaptureFixture) -> None:
    assert lfcc("inspect vit_tiny_patch16_224 --img-size 160") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1 prefix token" in lines[0] and lines[1].split() == [
        "tap",
        "module",
        "channels",
        "grid",
        "stride",
        "layout",
    ]
    assert lines[2].split() == ["0", "blocks.0", "192", "10", "x", "10", "16", "tokens"]
    assert [line.split()[0] for line in lines if "*" in line.split()[0]][:4] == ["1*", "3*", "9*", "11*"]
    assert lfcc("inspect test_resnet --img-size 64") == 0
    assert "2*   layer2  48" in capsys.readouterr().out
    assert lfcc("inspect nobody") == 1
    assert "has no model 'nobody'" in capsys.readouterr().err
