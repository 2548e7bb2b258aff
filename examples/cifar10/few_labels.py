"""Train a small ViT on CIFAR-10 from few labels and a CNN teacher: with labels only, with logit KD, and with LFCC.

Prints a table of accuracies and writes an HTML report with loss curves and plots.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from experiment import ARMS, Experiment, Outcome, Setting, accuracy, compare, predict
from images import Images
from plots import low_frequencies, predictions
from teacher import load_efficientnet_lite0
from torch import nn

from lfcc_kernels.distill.data import ImageArrays, fetch_cifar10, open_dataset
from lfcc_kernels.distill.report import text_table, write_report
from lfcc_kernels.ops.dispatch import select, why_missing


def create_parser(description: str, name: str) -> argparse.ArgumentParser:
    """The options of both examples."""
    parser = argparse.ArgumentParser(description=description)
    data = Path(os.environ.get("LFCC_DATA") or Path.home() / ".cache" / "lfcc_kernels" / "cifar10")
    output = Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")
    for option, default, text in (
        ("--data", data, "CIFAR-10 folder, downloaded if missing; LFCC_DATA sets it too (default: %(default)s)"),
        ("--output", output, f"new folder for the runs and the report (default: runs/{name}-TIME)"),
    ):
        parser.add_argument(option, type=Path, default=default, metavar="DIR", help=text)
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Download CIFAR-10 if necessary. Raises FileExistsError if the output folder exists."""
    if args.output.exists():
        raise FileExistsError(f"--output {args.output} already exists: choose a new folder")
    print(f"CIFAR-10 folder: {args.data}", flush=True)
    fetch_cifar10(args.data)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    args = create_parser(__doc__, "demo").parse_args(argv)
    try:
        prepare(args)
        train, test = (open_dataset("cifar10", args.data, split) for split in ("train", "val"))
        demonstrate(train, test, load_efficientnet_lite0(), args.output)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"few_labels: error: {error}", file=sys.stderr)
        return 1
    return 0


def demonstrate(
    train: ImageArrays, test: ImageArrays, teacher: nn.Module, output: Path, setting: Setting | None = None
) -> Path:
    """Run the experiment; `teacher` is a timm CNN with five stages and a `classifier`. Returns the report's path."""
    setting, started = setting or Setting(), time.perf_counter()
    print(backend())
    print(f"teacher: fitting a linear head on {setting.labelled:,} labelled images", flush=True)
    experiment = Experiment(Images.of(train), Images.of(test), len(train.classes), teacher, setting)
    outcomes = []
    for number, arm in enumerate(ARMS, start=1):
        print(f"student {number} of {len(ARMS)}: {arm.title}", flush=True)
        outcomes.append(experiment.train(arm, output))
    table, verdict = result_table(experiment, outcomes), conclusion(experiment, outcomes)
    duration = f"{(time.perf_counter() - started) / 60:.1f} minutes on {torch.get_num_threads()} threads"
    page = write_report(
        [output / outcome.arm.folder for outcome in outcomes],
        output,
        title="Distilling a CNN into a Vision Transformer on CIFAR-10",
        text=[description(setting), verdict, f"Total time: {duration}. {backend()}"],
        table=table,
        pictures=[
            predictions(experiment, outcomes, train.classes),
            *low_frequencies(experiment, next(o for o in outcomes if "lfcc" in o.arm.terms)),
        ],
    )
    print("", text_table(table), "", verdict, f"Total time: {duration}", f"Report: {page}", sep="\n")
    return page


def backend() -> str:
    """A sentence that names the backend of the LFCC loss."""
    name = select("info_nce", torch.device("cpu"), torch.float32, Setting.batch_size**2)
    if name != "eager":
        return f"The LFCC loss runs on compiled kernels (backend {name!r})."
    reason = why_missing("cpu") or "selected explicitly, or fastest by measurement"
    return f"The LFCC loss runs in plain PyTorch (backend 'eager'), not on compiled kernels: {reason}."


def description(setting: Setting) -> str:
    return (
        f"CIFAR-10 with {setting.labelled:,} labelled images in a pool of {setting.pool:,}. The teacher is an "
        "EfficientNet-Lite0 pretrained on ImageNet, frozen, with a linear head fitted on the labelled images; its "
        f"outputs are computed once per image at {setting.teacher_image_size} pixels. The students are Vision "
        "Transformers with the same initialisation, seed and "
        f"{setting.epochs * setting.updates:,} updates of {setting.batch_size} images. They are trained on the "
        "labelled images alone (cropped and flipped), with the teacher's logits on the pool, and with its low-pass "
        "pyramids too. Learning rate and temperatures were tuned in a few trial runs."
    )


def with_error(percent: float, count: int) -> str:
    """An accuracy with its standard error over `count` images."""
    return f"{percent:.1f} ± {(percent * (100 - percent) / count) ** 0.5:.1f} %"


def result_table(experiment: Experiment, outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """One row per student and one for the teacher."""
    test, watched = experiment.test, experiment.watched
    names = ("", "test accuracy", "training time", "time in loss")
    rows = [
        (
            outcome.arm.title,
            with_error(accuracy(outcome.predictions, test.labels), len(test)),
            f"{outcome.summary['seconds']:.0f} s",
            f"{outcome.summary['loss_share']:.1%}",
        )
        for outcome in outcomes
    ]
    teacher = predict(nn.Sequential(experiment.teacher.preprocess, experiment.teacher.model), watched)
    teacher_accuracy = with_error(accuracy(teacher, watched.labels), len(watched))
    rows.append((f"teacher ({len(watched):,} test images)", teacher_accuracy, "", ""))
    return [dict(zip(names, row, strict=True)) for row in rows]


def conclusion(experiment: Experiment, outcomes: Sequence[Outcome]) -> str:
    """A sentence that compares the two most accurate students."""
    labels = experiment.test.labels
    best, second, *_ = sorted(outcomes, key=lambda outcome: accuracy(outcome.predictions, labels), reverse=True)
    gain, error = compare(best.predictions, second.predictions, labels)
    result = f"{best.arm.title} is {gain:.1f} ± {error:.1f} percentage points more accurate than {second.arm.title}"
    if gain <= 2 * error:
        result = f"no significant difference: {result}"
    return (
        f"{result[0].upper()}{result[1:]}. This is one seed; ± is the standard error over the test images and does not "
        "include the variation between seeds."
    )


if __name__ == "__main__":
    sys.exit(main())
