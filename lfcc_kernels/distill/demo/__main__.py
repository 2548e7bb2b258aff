"""Fetch photographs, train three students from few labels and a teacher, print a table and write a page."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lfcc_kernels.backends import native
from lfcc_kernels.distill.cifar10 import fetch_cifar10
from lfcc_kernels.distill.data import ImageArrays, open_dataset
from lfcc_kernels.distill.report import text_table, write_report
from lfcc_kernels.ops.dispatch import select

from .experiment import ARMS, Experiment, Outcome, Setting, accuracy, compare, rank
from .images import Images
from .pictures import low_frequencies, predictions
from .teacher import load_efficientnet_lite0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lfcc_kernels.distill.demo", description=__doc__)
    cache = os.environ.get("LFCC_DATA") or Path.home() / ".cache" / "lfcc_kernels" / "cifar10"
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(cache),
        metavar="FOLDER",
        help="where CIFAR-10 is or is to be kept; LFCC_DATA sets the same (%(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"),
        metavar="FOLDER",
        help="for runs and report (runs/demo-TIME)",
    )
    args = parser.parse_args(argv)
    try:
        if args.output.exists():
            raise FileExistsError(f"{args.output} is there already: name another folder with --output")
        print(f"CIFAR-10: in {args.data}", flush=True)
        fetch_cifar10(args.data)
        train, test = (open_dataset("cifar10", args.data, split) for split in ("train", "val"))
        demonstrate(train, test, load_efficientnet_lite0(), args.output)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    return 0


def demonstrate(
    train: ImageArrays, test: ImageArrays, teacher: nn.Module, output: Path, setting: Setting | None = None
) -> Path:
    """Run the experiment with a timm CNN of five stages with a `classifier`; returns the path of the page."""
    setting, started = setting or Setting(), time.perf_counter()
    print(backend())
    print(f"teacher: a linear head learns from {setting.labelled:,} labelled photographs", flush=True)
    experiment = Experiment(Images.of(train), Images.of(test), len(train.classes), teacher, setting)
    outcomes = []
    for number, arm in enumerate(ARMS, start=1):
        print(f"student {number} of {len(ARMS)}: {arm.title}", flush=True)
        outcomes.append(experiment.train(arm, output))
    table, verdict = rows(experiment, outcomes), conclusion(experiment, outcomes)
    minutes = f"{(time.perf_counter() - started) / 60:.1f} minutes on {torch.get_num_threads()} threads"
    page = write_report(
        [output / outcome.arm.folder for outcome in outcomes],
        output,
        title="A Vision Transformer learns photographs from a CNN",
        text=[description(setting), verdict, f"All of it took {minutes}. {backend()}"],
        table=table,
        pictures=[
            predictions(experiment, outcomes, train.classes),
            *low_frequencies(experiment, next(o for o in outcomes if "lfcc" in o.arm.terms)),
        ],
    )
    print("", text_table(table), "", verdict, f"{minutes}; the page with curves and pictures: {page}", sep="\n")
    return page


def backend() -> str:
    """Which backend serves the LFCC loss here, in a sentence."""
    name = select("info_nce", torch.device("cpu"), torch.float32, Setting.batch_size**2)
    if name != "eager":
        return f"The LFCC loss is served by the compiled kernels (backend {name!r})."
    reason = f": {native.missing}" if native.missing else ", as asked for or measured to be fastest"
    return f"The LFCC loss is served by plain PyTorch (backend 'eager'), not by the compiled kernels{reason}."


def description(setting: Setting) -> str:
    return (
        f"CIFAR-10 with {setting.labelled:,} labelled photographs and a pool of {setting.pool:,}, which "
        "holds them and has no other labels. The teacher is an EfficientNet-Lite0 pretrained on ImageNet, "
        "frozen, behind a linear head fitted on the labelled photographs; it looks at the pool once, at "
        f"{setting.teacher_image_size} pixels. The students are Vision Transformers with one initialisation, "
        f"one seed and {setting.epochs * setting.updates:,} updates of {setting.batch_size} images each: "
        "from the labels alone (shifted and mirrored), with the teacher's logits on the pool, and with its "
        "low-pass pyramids too. Learning rate and temperatures were fixed in a few trial runs beforehand."
    )


def rows(experiment: Experiment, outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """A row for each student and one for the teacher, ready to print."""
    teacher = nn.Sequential(experiment.teacher.preprocess, experiment.teacher.model)
    watched = experiment.watched
    table = [
        {
            "": outcome.arm.title,
            "test accuracy": with_error(
                100 * (outcome.predictions == experiment.test.labels).double().mean().item(),
                len(experiment.test),
            ),
            "training": f"{outcome.summary['seconds']:.0f} s",
            "of it in the loss": f"{outcome.summary['loss_share']:.1%}",
        }
        for outcome in outcomes
    ]
    name = f"teacher ({len(watched):,} test images)"
    return [
        *table,
        {
            "": name,
            "test accuracy": with_error(accuracy(teacher, watched), len(watched)),
            "training": "",
            "of it in the loss": "",
        },
    ]


def with_error(percent: float, count: int) -> str:
    """An accuracy with its standard error over `count` images."""
    return f"{percent:.1f} ± {(percent * (100 - percent) / count) ** 0.5:.1f} %"


def conclusion(experiment: Experiment, outcomes: Sequence[Outcome]) -> str:
    """Who won and by how much, whoever it is."""
    best, second, *_ = rank(outcomes, experiment.test.labels)
    gain, error = compare(best.predictions, second.predictions, experiment.test.labels)
    verdict = f"{best.arm.title} is ahead of {second.arm.title} by {gain:.1f} ± {error:.1f} points"
    if gain < 2 * error:
        verdict = f"no clear winner: {verdict}"
    return (
        f"{verdict[0].upper()}{verdict[1:]}. One seed; ± is the standard error over the test images alone "
        "and says nothing about other seeds."
    )


if __name__ == "__main__":
    sys.exit(main())
