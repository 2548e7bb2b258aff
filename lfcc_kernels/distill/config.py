"""Settings of `fit` and options of `lfcc distill`.

Priority of options: command line, YAML file, options stored in the checkpoint, defaults.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from lfcc_kernels.filters import BANKS
from lfcc_kernels.functional import DIRECTIONS

_FIXED_BANKS = ("average", "gaussian", "dct")


@dataclass(frozen=True)
class FitSettings:
    """How `fit` trains; `lfcc distill --help` describes the fields. `amp` None means True on a GPU, False on a CPU."""

    epochs: int = 100
    accum_steps: int = 1
    opt: str = "adamw"
    momentum: float = 0.9
    lr: float = 5e-4
    weight_decay: float = 0.05
    sched: str = "cosine"
    min_lr: float = 1e-6
    decay_epochs: float = 30
    decay_rate: float = 0.1
    warmup_epochs: float = 5
    warmup_lr: float | None = None
    clip_grad: float | None = None
    amp: bool | None = None
    amp_dtype: str = "bfloat16"
    channels_last: bool = False
    torchcompile: bool = False
    fsdp: bool = False
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    log_interval: int = 50
    checkpoint_interval: int | None = None
    checkpoint_hist: int = 1

    def precision(self, device: torch.device) -> torch.dtype:
        """The dtype of matrix products and convolutions on `device`."""
        amp = device.type == "cuda" if self.amp is None else self.amp
        return getattr(torch, self.amp_dtype) if amp else torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The autocast context for that dtype."""
        dtype = self.precision(device)
        return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the long usage."""
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help lists the options\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text that does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, {}) or "default:" in (action.help or ""):
            return action.help
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def create_parser() -> argparse.ArgumentParser:
    """Every option of `lfcc distill`, with timm's names where timm has the option."""
    parser = _Parser(
        prog="lfcc distill",
        usage="%(prog)s --student MODEL --teacher MODEL --data-dir DIR [option ...]",
        description="Train a student on labels, on a teacher's logits (KD) and on its low-frequency features (LFCC). "
        "Start it with torchrun to train in several processes, one per GPU.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    count: dict[str, Any] = {"type": _count, "metavar": "N"}
    number: dict[str, Any] = {"type": float, "metavar": "FLOAT"}
    pixels: dict[str, Any] = {"type": _count, "metavar": "PX"}
    flag: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    taps: dict[str, Any] = {"type": _tap, "nargs": "+", "metavar": "TAP"}
    pairs: dict[str, Any] = {"nargs": "+", "action": _Pairs, "default": {}, "metavar": "KEY=VALUE"}
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="YAML file of options; the command line wins")

    add = parser.add_argument_group("data").add_argument
    names = "folder, tar, cifar10, fashion-mnist, digits, or a timm name such as torch/cifar100, hfds/NAME, wds/NAME"
    add("--dataset", default="folder", metavar="NAME", help=f"data set: {names}")
    add("--data-dir", default="data", metavar="DIR", help="root folder of the data set")
    add("--train-split", metavar="NAME", help="name of the training split (default: train)")
    add("--val-split", metavar="NAME", help="name of the validation split (default: validation)")
    add("--num-classes", **count, help="number of classes, required if the data set has no class names")
    add("--input-key", metavar="KEY", help="column of the images, or their file extensions in WebDataset shards")
    add("--target-key", metavar="KEY", help="column of the labels, or their JSON field in WebDataset shards")
    add("-b", "--batch-size", **count, default=128, help="images per batch and process")
    add("-j", "--workers", type=int, default=4, metavar="N", help="loader processes per training process")
    add("--img-size", **pixels, help="image size (default: the student's own)")
    kept = "fraction of the image kept by the center crop in validation (default: the student's own, often 0.875)"
    add("--crop-pct", **number, help=kept)

    add = parser.add_argument_group("augmentation").add_argument
    add("--aug", **flag, default=True, help="augment the training images")
    area = "area of random crops as a fraction of the image"
    add("--scale", type=float, nargs=2, default=(0.08, 1.0), metavar=("MIN", "MAX"), help=area)
    add("--hflip", **number, default=0.5, help="probability of a horizontal flip")
    add("--color-jitter", **number, default=0.4, help="strength of color jitter")
    add("--aa", metavar="POLICY", help="AutoAugment policy of timm, e.g. rand-m9-mstd0.5 (default: none)")
    add("--reprob", **number, default=0.0, help="probability of random erasing")
    add("--mixup", **number, default=0.0, help="mixup alpha, mixup enabled if > 0")
    add("--cutmix", **number, default=0.0, help="CutMix alpha, CutMix enabled if > 0")
    add("--mixup-prob", **number, default=1.0, help="probability of mixup or CutMix per batch")
    add("--mixup-switch-prob", **number, default=0.5, help="probability of CutMix if mixup and CutMix are enabled")
    add("--smoothing", **number, default=0.0, help="label smoothing")

    about = "timm model names; `lfcc inspect MODEL` lists the taps of a model: the layers whose features are compared"
    add = parser.add_argument_group("models", about).add_argument
    add("--student", "--model", metavar="MODEL", help="student, trained from random weights")
    add("--teacher", metavar="MODEL", help="frozen teacher with timm's pretrained weights or --teacher-checkpoint")
    add("--teacher-checkpoint", metavar="FILE", help="teacher weights: a checkpoint of timm or of another run")
    add("--teacher-cache", metavar="DIR", help="teacher cache of `lfcc cache`, used in place of the teacher")
    add("--teacher-img-size", **pixels, help="image size of the teacher (default: the student's)")
    add("--student-taps", **taps, help="taps of the student, indices or module names (default: four indices)")
    add("--teacher-taps", **taps, help="taps of the teacher, as many as of the student (default: four indices)")
    add("--student-kwargs", **pairs, help="arguments of timm.create_model for the student, e.g. patch_size=4")
    add("--teacher-kwargs", **pairs, help="arguments of timm.create_model for the teacher")

    add = parser.add_argument_group("loss", "cross-entropy + alpha * logit KD + beta * LFCC").add_argument
    add("--kd-alpha", **number, default=1.0, help="weight of logit KD, 0 disables it")
    add("--kd-temperature", **number, default=4.0, help="temperature of the logits in KD")
    add("--lfcc-beta", **number, default=1.0, help="weight of LFCC, 0 disables it")
    add("--lfcc-scales", **count, nargs="+", default=(1, 2, 4), help="grid sizes of the low-pass pyramid")
    add("--lfcc-temperature", **number, default=0.1, help="temperature of the contrastive loss")
    add("--lfcc-learnable-temperature", **flag, default=False, help="train the temperature of the contrastive loss")
    queries = "direction of the contrastive loss: which side has the queries and which the keys"
    add("--lfcc-direction", choices=DIRECTIONS, default="student_to_teacher", help=queries)
    add("--lfcc-student-filter", choices=tuple(BANKS), default="learnable", help="low-pass filter of student features")
    add("--lfcc-teacher-filter", choices=_FIXED_BANKS, default="average", help="low-pass filter of teacher features")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", **count, help="number of epochs")
    add("--accum-steps", **count, help="batches per update, contrasted as one batch (GradCache, two forward passes)")
    add("--opt", metavar="NAME", help="optimizer of timm")
    add("--momentum", **number, help="optimizer momentum")
    add("--lr", **number, help="learning rate after warm-up")
    add("--weight-decay", **number, help="weight decay, except for biases and normalization layers")
    sched = "learning rate schedule; none keeps --lr constant"
    add("--sched", choices=("cosine", "step", "none"), help=sched)
    add("--min-lr", **number, help="final learning rate of the cosine schedule")
    add("--decay-epochs", **number, help="epochs between decays of the step schedule")
    add("--decay-rate", **number, help="factor of the learning rate in each decay of the step schedule")
    add("--warmup-epochs", **number, help="epochs of linear warm-up")
    add("--warmup-lr", **number, help="initial learning rate of the warm-up (default: --lr / 100)")
    norm = "maximum gradient norm of student, projections and filters together (default: no clipping)"
    add("--clip-grad", **number, help=norm)
    add("--amp", **flag, help="mixed precision (default: on GPUs only)")
    add("--amp-dtype", choices=("bfloat16", "float16"), help="dtype of mixed precision")
    add("--channels-last", **flag, help="channels-last memory layout of images and feature maps")
    add("--torchcompile", **flag, help="compile student and losses with torch.compile")
    add("--fsdp", **flag, help="shard student, optimizer and moving average over the processes (FSDP2)")
    add("--model-ema", **flag, help="keep an exponential moving average of the student's weights and evaluate it too")
    add("--model-ema-decay", **number, help="decay of the moving average, after a warm-up from 0")
    add("--seed", type=int, default=42, metavar="N", help="random seed of weights, data order and augmentation")
    add("--device", metavar="NAME", help="device, e.g. cuda:1 (default: cuda if available, otherwise cpu)")

    add = parser.add_argument_group("output").add_argument
    add("--output", default="runs", metavar="DIR", help="parent folder of the run folders")
    add("--experiment", metavar="NAME", help="name of the run folder (default: STUDENT-TEACHER-TIME)")
    resume = "checkpoint or run folder to resume from, or `latest` for the latest run in --output (default: new run)"
    add("--resume", metavar="PATH", help=resume)
    add("--log-interval", **count, help="updates per row of the log")
    interval = "updates between checkpoints within an epoch (default: save at the end of each epoch only)"
    add("--checkpoint-interval", **count, help=interval)
    add("--checkpoint-hist", **count, help="number of best epochs whose checkpoints are kept")
    parser.set_defaults(**asdict(FitSettings()))
    return parser


def merge(parser: argparse.ArgumentParser, argv: Sequence[str], *configs: Mapping[str, Any]) -> argparse.Namespace:
    """Parse `configs`, then `argv`: later values win, and all pass the same checks."""
    return parser.parse_args([word for config in configs for word in _as_words(parser, config)] + list(argv))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping of options. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"--config {path} does not exist")
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config or {}, dict):
        raise ValueError(f"{path} is a YAML {type(config).__name__}, expected a mapping of option names to values")
    return config or {}


def as_config(args: argparse.Namespace) -> dict[str, Any]:
    """The options as plain values for YAML and checkpoints, without --config and --resume."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(args).items()}
    return {name: value for name, value in plain.items() if name not in ("config", "resume")}


def _as_words(parser: argparse.ArgumentParser, config: Mapping[str, Any]) -> list[str]:
    known, words = vars(parser.parse_args([])), []
    for key, value in config.items():
        option = str(key).replace("_", "-")
        if option.replace("-", "_") not in known:
            raise ValueError(f"unknown option {key!r} in the configuration: `lfcc distill --help` lists the options")
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
        raise argparse.ArgumentTypeError(f"got {text}, expected an integer >= 1")
    return int(text)


def _tap(text: str) -> int | str:
    return int(text) if text.isdigit() else text


class _Pairs(argparse.Action):
    """Parses KEY=VALUE words into a dict; values are YAML."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        pairs = [word.partition("=") for word in values]
        if not all(separator for _, separator, _ in pairs):
            parser.error(f"{option_string} got {' '.join(values)}, expected KEY=VALUE ...")
        setattr(namespace, self.dest, {key: yaml.safe_load(value) for key, _, value in pairs})
