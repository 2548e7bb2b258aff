"""`lfcc cache`, and `lfcc distill` with its cache."""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from timm.data import create_transform, resolve_data_config

from lfcc_kernels.cli import main
from lfcc_kernels.distill import build, read_csv
from lfcc_kernels.distill.build import create_distiller, create_teacher, identity_of, open_split
from lfcc_kernels.distill.config import create_parser
from lfcc_kernels.distill.data import ImageArrays
from lfcc_kernels.distill.data.evaluation import EvaluationImages
from lfcc_kernels.distill.teacher_cache import CacheError, Manifest, TeacherCache

OPTIONS = {
    "dataset": "digits",
    "img_size": 32,
    "crop_pct": 1.0,
    "workers": 0,
    "student": "test_vit",
    "student_kwargs": {"patch_size": 8},
    "student_taps": [0, 2, 5],
    "teacher": "test_resnet",
    "teacher_taps": [1, 2, 3],
    "lfcc_scales": [1, 2],
    "aug": False,
}
WORDS = (
    "--img-size 32 --student test_vit --student-kwargs patch_size=8 --student-taps 0 2 5 --teacher test_resnet "
    "--teacher-taps 1 2 3 --lfcc-scales 1 2 --teacher-checkpoint {teacher}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run_file(teacher: Path) -> Path:
    path = teacher.with_name("run.yaml")
    path.write_text(yaml.safe_dump({**OPTIONS, "teacher_checkpoint": str(teacher), "epochs": 1, "log_interval": 1}))
    return path


@pytest.fixture(scope="module")
def made(run_file: Path) -> Path:
    torch.set_num_threads(1)
    folder = run_file.with_name("cache")
    assert main(["cache", str(folder), "-c", str(run_file)]) == 0
    return folder


def parse(words: str) -> argparse.Namespace:
    return create_parser().parse_args(words.split())


def test_cached_outputs_are_those_of_the_teacher(made: Path, teacher: Path) -> None:
    args = parse(f"--dataset digits --crop-pct 1 {WORDS.format(teacher=teacher)}")
    student = timm.create_model("test_vit", img_size=32, patch_size=8)
    data_config = resolve_data_config({"img_size": 32, "crop_pct": 1.0}, model=student)
    distiller = create_distiller(args, student, create_teacher(args, student, 10, 32), 32)
    images = EvaluationImages(open_split(args, "train"), create_transform(**data_config))
    cache, order = TeacherCache.open(made), [1347, 0, 1023, 1024]
    shown = torch.stack([images[index][0] for index in order])
    for flipped in (False, True):
        live = distiller.teach(shown.flip(-1) if flipped else shown)
        kept = cache.outputs(torch.stack([cache.row(index, flipped) for index in order]))
        for found, expected in zip([kept.logits, *kept.pyramids], [live.logits, *live.pyramids], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_run_with_the_cache_equals_one_with_the_teacher(
    made: Path, run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["distill", "-c", str(run_file), "--hflip", "0", "--output", str(tmp_path)]
    assert main([*words, "--experiment", "live"]) == 0
    monkeypatch.setattr(build, "load_teacher", lambda *args, **kwargs: pytest.fail("the teacher was loaded"))
    assert main([*words, "--experiment", "cached", "--teacher-cache", str(made)]) == 0
    live, cached = (read_csv(tmp_path / name / "steps.csv") for name in ("live", "cached"))
    assert len(live) == len(cached) == 10
    for found, expected in zip(cached, live, strict=True):
        for term in ("loss", "ce", "kd", "lfcc", "grad_norm"):
            # kd is a small difference of logarithms times the squared temperature, rounded in float32
            tolerance = pytest.approx(expected[term], rel=1e-4, abs=1e-6 if term == "kd" else None)
            assert found[term] == tolerance, (expected["step"], term)


def test_output_and_a_second_run(made: Path, run_file: Path, capsys: pytest.CaptureFixture) -> None:
    files = {path: path.stat().st_mtime_ns for path in made.glob("*.npy")}
    row = 2 * (10 + 5 * sum(TeacherCache.open(made).channels))
    assert main(["cache", str(made), "-c", str(run_file)]) == 0
    plan, end = capsys.readouterr().out.splitlines()
    assert f"1348 images and their flips, {row / 1000:.4g} kB per row in float16, {2 * 1348 * row / 1e6:.4g} MB" in plan
    assert "in total; 0 of 2 parts to write; " in plan and plan.endswith(" free")
    assert "cache is complete: reads " in end and "the teacher" not in end
    assert {path: path.stat().st_mtime_ns for path in made.glob("*.npy")} == files
    (made / "part-00001.npy").unlink()
    assert main(["cache", str(made), "-c", str(run_file)]) == 0
    plan, end = capsys.readouterr().out.splitlines()
    assert "1 of 2 parts to write" in plan and " images/s per process, " in end and "x the teacher on cpu (" in end
    assert TeacherCache.open(made)


def test_logits_alone(run_file: Path, tmp_path: Path) -> None:
    options = ["--lfcc-beta", "0", "--hflip", "0", "--cache-dtype", "float32", "--amp"]
    assert main(["cache", str(tmp_path / "cache"), "-c", str(run_file), *options]) == 0
    cache = TeacherCache.open(tmp_path / "cache")
    assert cache.taps == () and not cache.flips and cache.manifest.precision == "bfloat16"
    assert cache.row(5, False).shape == (10,) and cache.row(5, False).dtype == torch.float32


def test_logits_are_cached_also_with_weight_zero(run_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "five.pt"
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), other)
    words = ["-c", str(run_file), "--hflip", "0", "--kd-alpha", "0", "--teacher-checkpoint", str(other)]
    assert main(["cache", str(tmp_path / "cache"), *words]) == 0
    assert TeacherCache.open(tmp_path / "cache").num_classes == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--teacher-checkpoint {tmp}/five.pt", "the teacher has 5 classes but digits has 10"),
        ("--teacher-checkpoint nowhere.pt", "--teacher-checkpoint nowhere.pt does not exist"),
        ("--kd-alpha 0 --lfcc-beta 0", "--kd-alpha and --lfcc-beta are 0, so there is nothing to cache"),
        ("--student-taps 0 5", "the student has 2 taps but the teacher has 3"),
        (
            "--cache-dtype float32",
            "{made} contains another cache: dtype is float32 in this run but float16 in the cache",
        ),
        (
            "--teacher-taps 2 3 4 --lfcc-scales 1",
            "identity pyramids taps is [2, 3, 4] in this run but [1, 2, 3] in the cache",
        ),
    ],
)
def test_user_errors_are_one_line_and_change_nothing(
    made: Path, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: str, message: str
) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "five.pt")
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    words = options.format(tmp=tmp_path).split()
    assert main(["cache", str(made), "-c", str(run_file), *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lfcc: error: ") and message.format(made=made) in error and error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_required_arguments(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["cache", str(tmp_path / "cache")]) == 1
    assert "--student is required: it defines the preprocessing" in capsys.readouterr().err
    for words in ([], ["--student", "test_vit", str(tmp_path)]):
        with pytest.raises(SystemExit) as end:
            main(["cache", *words])
        assert end.value.code == 2
        assert "lfcc cache: error: the first argument must be DIR, the folder of the cache" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["cache", "--help"])
    assert end.value.code == 0 and "lfcc cache DIR" in capsys.readouterr().out


PIXELS = np.random.default_rng(0).integers(256, size=(6, 8, 8), dtype=np.uint8)
LABELS = np.arange(6) % 2
DATA_CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.95,
    "crop_mode": "center",
}


def identity(words: str, data_config: dict | None = None, pixels: np.ndarray = PIXELS, labels: np.ndarray = LABELS):
    return identity_of(parse(words), DATA_CONFIG | (data_config or {}), ImageArrays(pixels, labels, ["a", "b"]))


def cache_of(made_with: dict) -> TeacherCache:
    written = Manifest(made_with, taps=(), num_classes=2, cells=0, images=6, precision="float32").to_json()
    return TeacherCache(Path("there"), Manifest(written["identity"], (), 2, 0, 6, "float32"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--teacher test_vit", "teacher model is test_vit in this run but test_resnet in the cache"),
        (
            "--teacher-checkpoint {other}",
            r"teacher weights is [0-9a-f]{{64}} in this run but [0-9a-f]{{64}} in the cache",
        ),
        ("--teacher-kwargs drop_rate=0.1", "teacher kwargs drop rate is 0.1 in this run but None in the cache"),
        ("--teacher-img-size 64", "teacher image size is 64 in this run but 32 in the cache"),
        ("--teacher-taps 1 2 4", r"pyramids taps is \[1, 2, 4\] in this run but \[1, 2, 3\] in the cache"),
        ("--lfcc-scales 1 2 4", r"pyramids scales is \[1, 2, 4\] in this run but \[1, 2\] in the cache"),
        ("--lfcc-teacher-filter dct", "pyramids filter is dct in this run but average in the cache"),
        ("--dataset cifar10", "data set is cifar10 in this run but folder in the cache"),
        ("--train-split small", "data split is small in this run but None in the cache"),
    ],
)
def test_other_options_are_refused_and_named(teacher: Path, tmp_path: Path, options: str, message: str) -> None:
    base, other = WORDS.format(teacher=teacher), tmp_path / "other.pt"
    other.write_bytes(teacher.read_bytes()[:-1] + b"\1")
    cache = cache_of(identity(base))
    cache.require(identity(base))
    with pytest.raises(
        CacheError, match=f"the cache there does not match this run: {message.format()}. Change the options"
    ):
        cache.require(identity(f"{base} {options.format(other=other)}"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_config": {"input_size": (3, 64, 64)}}, "teacher image size is 64 in this run but 32 in the cache"),
        (
            {"data_config": {"interpolation": "bilinear"}},
            "preprocessing interpolation is bilinear in this run but bicubic in",
        ),
        (
            {"data_config": {"mean": (0.5, 0.5, 0.4)}},
            r"preprocessing mean is \[0.5, 0.5, 0.4\] in this run but \[0.5, 0.5, 0.5\]",
        ),
        ({"data_config": {"std": (0.5, 0.5, 0.4)}}, "preprocessing std is"),
        ({"data_config": {"crop_pct": 1.0}}, "preprocessing crop pct is 1.0 in this run but 0.95 in the cache"),
        (
            {"data_config": {"crop_mode": "border"}},
            "preprocessing crop mode is border in this run but center in the cache",
        ),
        ({"pixels": PIXELS[:5], "labels": LABELS[:5]}, "data images is 5 in this run but 6 in the cache"),
        ({"pixels": PIXELS[::-1]}, "data fingerprint is"),
        ({"pixels": PIXELS ^ (np.arange(8) == 5).astype(np.uint8)}, "data fingerprint is"),
    ],
)
def test_other_data_is_refused_and_named(teacher: Path, changes: dict, message: str) -> None:
    base = WORDS.format(teacher=teacher)
    with pytest.raises(CacheError, match=message):
        cache_of(identity(base)).require(identity(base, **changes))


@pytest.mark.parametrize(
    "options",
    [
        "--lr 1 --epochs 3 -b 7 -j 0 --seed 1 --amp --sched none --clip-grad 1",
        "--student-taps 1 3 4 --lfcc-student-filter dct --lfcc-temperature 0.2 --lfcc-direction symmetric",
        "--data-dir elsewhere --kd-temperature 2 --hflip 0.1 --kd-alpha 0.3 --lfcc-beta 7",
        "--hflip 0",
        "--lfcc-beta 0 --lfcc-scales 5 --teacher-taps 1",
        "--teacher-checkpoint {copy}",
    ],
)
def test_options_that_a_run_may_change(teacher: Path, tmp_path: Path, options: str) -> None:
    base, copy = WORDS.format(teacher=teacher), tmp_path / "moved.pt"
    shutil.copy(teacher, copy)
    cache_of(identity(base)).require(identity(f"{base} {options.format(copy=copy)}"))


@pytest.mark.parametrize(("lacking", "message"), [("--hflip 0", "flips is True"), ("--lfcc-beta 0", "pyramids is {")])
def test_a_cache_without_flips_or_pyramids_is_refused_if_the_run_needs_them(
    teacher: Path, lacking: str, message: str
) -> None:
    base = WORDS.format(teacher=teacher)
    with pytest.raises(CacheError, match=f"{message}.* in this run but None in the cache"):
        cache_of(identity(f"{base} {lacking}")).require(identity(base))


def test_pretrained_weights_are_identified_by_name() -> None:
    words = "--student test_vit --teacher test_resnet"
    assert identity(words)["teacher"]["weights"] == "timm/test_resnet.r160_in1k"
    cache_of(identity(words)).require(identity(words))
    with pytest.raises(ValueError, match=r"--teacher test_resnet\.nobody: Invalid pretrained tag"):
        identity(f"{words}.nobody")
    with pytest.raises(CacheError, match="teacher model is resnet_of_nobody in this run but test_resnet in the cache"):
        cache_of(identity(words)).require(identity("--teacher resnet_of_nobody"))
