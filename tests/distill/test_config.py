"""Options from the command line and from YAML."""

from pathlib import Path

import pytest
import yaml

from lfcc_kernels.distill import FitSettings
from lfcc_kernels.distill.config import as_config, create_parser, merge, read_yaml


def test_priority_of_command_line_yaml_and_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "lr: 1e-3\nbatch_size: 64\nwarmup-epochs: 2\nmodel_ema: true\naug: false\nlfcc_scales: [1, 2]\n"
        "student_kwargs: {patch_size: 4, global_pool: avg, qkv_bias: false}\n"
        "student_taps: [0, blocks.3]\nteacher:\n"
    )
    args = merge(create_parser(), ["--lr", "2e-3", "--lfcc-scales", "7"], read_yaml(path))
    assert (args.lr, args.batch_size, args.warmup_epochs, args.model_ema, args.aug) == (2e-3, 64, 2.0, True, False)
    assert args.lfcc_scales == [7] and args.student_taps == [0, "blocks.3"] and args.teacher is None
    assert args.student_kwargs == {"patch_size": 4, "global_pool": "avg", "qkv_bias": False}
    assert args.epochs == FitSettings().epochs and args.weight_decay == FitSettings().weight_decay


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    words = "--student resnet18 --student-taps 1 layer2 --student-kwargs drop_rate=0.1 norm=null --clip-grad 5"
    args = merge(create_parser(), [*words.split(), "--no-amp", "--experiment", "two words", "--kd-alpha", "-1"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(as_config(args)))
    assert as_config(merge(create_parser(), [], read_yaml(path))) == as_config(args)
    assert args.amp is False and args.kd_alpha == -1


def test_timms_names(capsys: pytest.CaptureFixture) -> None:
    args = create_parser().parse_args(
        ["--model", "vit_tiny_patch16_224", "-b", "8", "-j", "2", "--hflip", "0", "--scale", "0.5", "1"]
    )
    assert (args.student, args.batch_size, args.workers, args.hflip, args.scale) == (
        "vit_tiny_patch16_224", 8, 2, 0.0, [0.5, 1.0]
    )  # fmt: skip
    with pytest.raises(SystemExit, match="0"):
        create_parser().parse_args(["--help"])
    assert "--lfcc-temperature FLOAT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown option 'learning_rate'"),
        ("- 1", "is a YAML list, expected a mapping"),
        ("lr: [", "is not valid YAML"),
    ],
)
def test_invalid_files_raise(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        merge(create_parser(), [], read_yaml(path))


@pytest.mark.parametrize("text", ["epochs: 1.5", "epochs: many", "batch_size: 0", "sched: steps", "aug: 3"])
def test_invalid_values_in_yaml_raise_as_on_the_command_line(text: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        merge(create_parser(), [], yaml.safe_load(text))
    error = capsys.readouterr().err
    assert text.split(":")[0].replace("_", "-") in error and error.count("\n") == 1
