"""Options of `lfcc distill`: the command line over YAML over a checkpoint's options over the defaults."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lfcc_kernels.filters import BANKS
from lfcc_kernels.functional import DIRECTIONS

from .loop import FitSettings

_FIXED_BANKS = ("average", "gaussian", "dct")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage: it would be forty."""
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help lists the options\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def create_parser() -> argparse.ArgumentParser:
    """Every option of `lfcc distill`, named as in timm where timm has it."""
    parser = _Parser(
        prog="lfcc distill",
        usage="%(prog)s --student MODEL --teacher MODEL --data-dir DIR [option ...]",
        description="Train a student with labels, a teacher's logits and its low-frequency features; started by "
        "torchrun, on as many GPUs as it has processes.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="YAML file of options; the command line wins")

    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        default="folder",
        metavar="NAME",
        help="folder, tar, cifar10, fashion-mnist, digits, or a timm name as torch/cifar100, hfds/NAME, wds/NAME",
    )
    add("--data-dir", default="data", metavar="DIR", help="where the data is")
    add("--train-split", metavar="NAME", help="for timm names; train if not given")
    add("--val-split", metavar="NAME", help="for timm names; validation if not given")
    add("--num-classes", type=_count, metavar="N", help="where the data set does not tell")
    add("--input-key", metavar="KEY", help="of the images in shards and Hugging Face data sets")
    add("--target-key", metavar="KEY", help="of the labels there")
    add("-b", "--batch-size", type=_count, default=128, metavar="N", help="images of a process in a batch")
    add("-j", "--workers", type=int, default=4, metavar="N", help="processes that load images")
    add("--img-size", type=_count, metavar="PX", help="side of the images; the student's own if not given")
    add("--crop-pct", type=float, metavar="X", help="part of a validation image that is looked at")

    add = parser.add_argument_group("augmentation").add_argument
    add("--aug", action=flag, default=True, help="augment the training images")
    add("--scale", type=float, nargs=2, default=(0.08, 1.0), metavar="AREA", help="area of the random crops")
    add("--hflip", type=float, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--color-jitter", type=float, default=0.4, metavar="X", help="strength of the color jitter")
    add("--aa", metavar="POLICY", help="timm's auto-augment policy, such as rand-m9-mstd0.5")
    add("--reprob", type=float, default=0.0, metavar="P", help="probability of random erasing")
    add("--mixup", type=float, default=0.0, metavar="A", help="mixup alpha; 0 leaves it out")
    add("--cutmix", type=float, default=0.0, metavar="A", help="cutmix alpha; 0 leaves it out")
    add("--mixup-prob", type=float, default=1.0, metavar="P", help="probability that a batch is mixed")
    add("--mixup-switch-prob", type=float, default=0.5, metavar="P", help="that it is by cutmix, where both are on")
    add("--smoothing", type=float, default=0.0, metavar="X", help="label smoothing")

    add = parser.add_argument_group("models", "timm names; `lfcc inspect MODEL` lists the taps").add_argument
    add("--student", "--model", metavar="MODEL", help="trained from scratch")
    add("--teacher", metavar="MODEL", help="frozen; timm's pretrained weights without --teacher-checkpoint")
    add("--teacher-checkpoint", metavar="FILE", help="the teacher's weights: of timm, or of another run")
    add("--teacher-cache", metavar="DIR", help="what `lfcc cache` kept of the teacher, which is then not loaded")
    add("--teacher-img-size", type=_count, metavar="PX", help="resize the teacher's images to this side")
    add(
        "--student-taps",
        type=_tap,
        nargs="+",
        metavar="TAP",
        help="indices or module names; four if not given",
    )
    add("--teacher-taps", type=_tap, nargs="+", metavar="TAP", help="as many as the student has")
    add("--student-kwargs", nargs="+", action=_Pairs, default={}, metavar="KEY=VALUE", help="as patch_size=4")
    add(
        "--teacher-kwargs",
        nargs="+",
        action=_Pairs,
        default={},
        metavar="KEY=VALUE",
        help="for timm.create_model",
    )

    add = parser.add_argument_group("loss", "cross-entropy + alpha * logit KD + beta * LFCC").add_argument
    add("--kd-alpha", type=float, default=1.0, metavar="A", help="weight of logit KD; 0 leaves it out")
    add("--kd-temperature", type=float, default=4.0, metavar="T", help="softens both sides' logits")
    add("--lfcc-beta", type=float, default=1.0, metavar="B", help="weight of LFCC; 0 leaves it out")
    add("--lfcc-scales", type=_count, nargs="+", default=(1, 2, 4), metavar="S", help="grids of the low-pass")
    add("--lfcc-temperature", type=float, default=0.1, metavar="TAU", help="of the contrast")
    add("--lfcc-learnable-temperature", action=flag, default=False, help="train the contrast's temperature")
    add("--lfcc-direction", choices=DIRECTIONS, default="student_to_teacher", help="who looks for whom")
    add("--lfcc-student-filter", choices=tuple(BANKS), default="learnable", help="low-pass of the student")
    add("--lfcc-teacher-filter", choices=_FIXED_BANKS, default="average", help="low-pass of the teacher")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=_count, metavar="N", help="passes over the training images")
    add("--accum-steps", type=_count, metavar="K", help="batches in an update, contrasted as one; costs two passes")
    add("--opt", metavar="NAME", help="an optimizer of timm")
    add("--momentum", type=float, metavar="X", help="of optimizers that have one")
    add("--lr", type=float, help="learning rate after the warm-up")
    add("--weight-decay", type=float, metavar="X", help="not on biases and norms")
    add("--sched", choices=("cosine", "step", "none"), help="none keeps --lr throughout")
    add("--min-lr", type=float, metavar="LR", help="where the cosine ends")
    add("--decay-epochs", type=float, metavar="N", help="epochs between two steps of --sched step")
    add("--decay-rate", type=float, metavar="X", help="factor of such a step")
    add("--warmup-epochs", type=float, metavar="N", help="linear")
    add("--warmup-lr", type=float, metavar="LR", help="where the warm-up starts; a hundredth of --lr if not given")
    add("--clip-grad", type=float, metavar="NORM", help="of student, projections and filters together")
    add("--amp", action=flag, help="mixed precision; on a GPU only if not given")
    add("--amp-dtype", choices=("bfloat16", "float16"), help="of mixed precision")
    add("--channels-last", action=flag, help="keep maps channels-last")
    add("--torchcompile", action=flag, help="compile student and loss")
    add("--fsdp", action=flag, help="shard student, optimizer and average over the processes (FSDP2)")
    add("--model-ema", action=flag, help="keep and evaluate a moving average of the student")
    add("--model-ema-decay", type=float, metavar="X", help="approached from 0")
    add("--seed", type=int, default=42, help="of weights, order and augmentation")
    add("--device", metavar="NAME", help="such as cuda:1; a GPU if there is one")

    add = parser.add_argument_group("run folder").add_argument
    add("--output", default="runs", metavar="DIR", help="where run folders are made")
    add("--experiment", metavar="NAME", help="name of the run folder; models and time if not given")
    add("--resume", metavar="PATH", help="go on from a checkpoint, from a run folder or from the `latest` run")
    add("--log-interval", type=_count, metavar="N", help="updates between two rows of the log")
    add(
        "--checkpoint-interval",
        type=_count,
        metavar="N",
        help="also save every N updates, not only every epoch",
    )
    add("--checkpoint-hist", type=_count, metavar="N", help="keep the checkpoints of the N best epochs")
    parser.set_defaults(**asdict(FitSettings()))
    return parser


def merge(parser: argparse.ArgumentParser, argv: Sequence[str], *configs: Mapping[str, Any]) -> argparse.Namespace:
    """Parse `argv` over `configs`, later ones over earlier ones, so that all values pass the same checks."""
    return parser.parse_args([word for config in configs for word in _as_words(parser, config)] + list(argv))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping of options. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}")
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config or {}, dict):
        raise ValueError(f"{path} must map option names to values, got a {type(config).__name__}")
    return config or {}


def as_config(args: argparse.Namespace) -> dict[str, Any]:
    """The options as plain values for YAML and checkpoints, without those that say where to start from."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(args).items()}
    return {name: value for name, value in plain.items() if name not in ("config", "resume")}


def _as_words(parser: argparse.ArgumentParser, config: Mapping[str, Any]) -> list[str]:
    known, words = vars(parser.parse_args([])), []
    for key, value in config.items():
        option = str(key).replace("_", "-")
        if option.replace("-", "_") not in known:
            raise ValueError(f"the configuration has an unknown option {key!r}; lfcc distill --help lists all")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, dict):
            words += [f"--{option}", *(f"{k}={json.dumps(v)}" for k, v in value.items())] if value else []
        elif isinstance(value, list):
            words += [f"--{option}", *map(str, value)]
        elif value is not None:
            words.append(f"--{option}={value}")
    return words


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return int(text)


def _tap(text: str) -> int | str:
    return int(text) if text.isdigit() else text


class _Pairs(argparse.Action):
    """key=value words, values as in YAML, to a dict."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        pairs = [word.partition("=") for word in values]
        if not all(separator for _, separator, _ in pairs):
            parser.error(f"{option_string} takes key=value, got {' '.join(values)}")
        setattr(namespace, self.dest, {key: yaml.safe_load(value) for key, _, value in pairs})
