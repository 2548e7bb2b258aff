"""Train a small ViT twice on CIFAR-10, in one process and in two that split each batch, and compare the losses.

Each of two ranks contrasts its half of a batch with the teacher features of the whole batch, so both runs have the same
loss up to rounding. Everything runs on the CPU with one thread per process.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from experiment import create_student
from few_labels import create_parser, prepare
from teacher import create_teacher, load_efficientnet_lite0
from timm.data import create_transform, resolve_data_config

from lfcc_kernels.distill import Distiller, FitSettings, RunFolder, build_lfcc, fit, read_csv
from lfcc_kernels.distill.data import ImageArrays, open_dataset
from lfcc_kernels.distill.data.evaluation import evaluation_loader, top1
from lfcc_kernels.distill.data.loader import TrainBatches
from lfcc_kernels.distill.distributed import distributed_context, rank, world_size
from lfcc_kernels.distill.report import text_table, write_report

BATCH_SIZE, IMAGES, TEST_IMAGES, EPOCHS = 64, 3_200, 1_000, 2
TEACHER_IMAGE_SIZE = 64
TOLERANCE = 0.01  # relative difference of the losses: rounding errors grow slowly, a wrong gradient exceeds it at once


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code, which is 1 if the losses differ."""
    parser = create_parser(__doc__, "demo-ddp")
    parser.add_argument("--train", metavar="RUN", help="train one run in this process group instead (internal)")
    args = parser.parse_args(argv)
    try:
        if args.train:
            with distributed_context(torch.device("cpu")):
                splits = (open_dataset("cifar10", args.data, split) for split in ("train", "val"))
                train(*splits, args.output / args.train)
            return 0
        prepare(args)
        for run, processes in (("one-process", 1), ("two-processes", 2)):
            print(f"{run}: {processes} x {BATCH_SIZE // processes} images per batch", flush=True)
            start(processes, ["--data", str(args.data), "--output", str(args.output), "--train", run])
        return 0 if compare(args.output) else 1
    except (OSError, ValueError, ModuleNotFoundError, subprocess.CalledProcessError) as error:
        print(f"two_processes: error: {error}", file=sys.stderr)
        return 1


def start(processes: int, arguments: Sequence[str]) -> None:
    """Run this script in `processes` processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else ()), __file__, *arguments]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def train(images: ImageArrays, test_images: ImageArrays, folder: Path) -> None:
    """Train one run in all processes of the process group."""
    torch.set_num_threads(1)
    ranks = {"rank": rank(), "world_size": world_size()}
    student = create_student(len(images.classes), seed=0)
    teacher = create_teacher(load_efficientnet_lite0(), student.model, TEACHER_IMAGE_SIZE)
    distiller = Distiller(student, teacher, build_lfcc(student, teacher, scales=(1, 2)), alpha=0)
    data_config = resolve_data_config({"input_size": (3, 32, 32)}, model=student.model)
    batches = TrainBatches(
        first(images, IMAGES),
        create_transform(**data_config, is_training=True, scale=(0.5, 1.0)),
        batch_size=BATCH_SIZE // world_size(),
        seed=0,
        **ranks,
    )
    test = first(test_images, TEST_IMAGES)
    loader = evaluation_loader(test, create_transform(**data_config), batch_size=BATCH_SIZE, **ranks)
    settings = FitSettings(epochs=EPOCHS, lr=2e-3, warmup_epochs=0.3, log_interval=5)
    fit(distiller, batches, partial(top1, loader=loader, num_classes=len(test.classes)), settings, RunFolder(folder))


def first(images: ImageArrays, number: int) -> ImageArrays:
    """The first `number` images."""
    return ImageArrays(images.images[:number], images.labels[:number], images.classes)


def compare(output: Path) -> bool:
    """Print the losses of both runs and write a report. Returns whether they agree."""
    folders = [output / "one-process", output / "two-processes"]
    one, two = ([(row["step"], row["loss"]) for row in read_csv(folder / "steps.csv")] for folder in folders)
    differences = [abs(b - a) / a for (_, a), (_, b) in zip(one, two, strict=True)]
    table = [
        {
            "update": f"{step:.0f}",
            "loss, one process": f"{a:.6f}",
            "loss, two processes": f"{b:.6f}",
            "relative difference": f"{difference:.1e}",
        }
        for (step, a), (_, b), difference in zip(one, two, differences, strict=True)
    ]
    agree = max(differences) <= TOLERANCE
    speeds = [read_csv(folder / "summary.csv")[-1]["images_per_second"] for folder in folders]
    verdict = (
        f"The losses of one and of two processes {'agree' if agree else 'differ'}: the largest relative difference in "
        f"{table[-1]['update']} updates is {max(differences):.1e}. Throughput: {speeds[0]:.0f} images/s in one "
        f"process, {speeds[1]:.0f} in two."
    )
    page = write_report(folders, output, title="One process against two", text=[verdict], table=table)
    print("", text_table(table), "", verdict, f"Report: {page}", sep="\n")
    return agree


if __name__ == "__main__":
    sys.exit(main())
