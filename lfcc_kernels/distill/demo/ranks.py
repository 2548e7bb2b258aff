"""Train one small student twice on real photographs, by one process and by two that share the batch, and compare.

Of two ranks each has half of a batch and contrasts its images with what the teacher says of both halves, so the loss
curves are one but for rounding. All runs on the CPU, a thread a process.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from timm.data import create_transform, resolve_data_config

from lfcc_kernels.distill import Distiller, FitSettings, RunFolder, build_lfcc, create_extractor, fit, read_csv
from lfcc_kernels.distill.cifar10 import fetch_cifar10
from lfcc_kernels.distill.data import ImageArrays, open_dataset
from lfcc_kernels.distill.loader import TrainBatches, evaluation_loader, top1
from lfcc_kernels.distill.models import TeacherInput
from lfcc_kernels.distill.ranks import joined, rank, world_size
from lfcc_kernels.distill.report import text_table, write_report

from .experiment import create_student
from .teacher import load_efficientnet_lite0

BATCH_SIZE, IMAGES, TEST_IMAGES, EPOCHS = 64, 3_200, 1_000, 2
TEACHER_IMAGE_SIZE = 64
TOLERANCE = 0.01  # of the loss: rounding grows from update to update, a wrong gradient is beyond it at once


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code, which is 1 where the curves part."""
    parser = argparse.ArgumentParser(prog="python -m lfcc_kernels.distill.demo.ranks", description=__doc__)
    cache = os.environ.get("LFCC_DATA") or Path.home() / ".cache" / "lfcc_kernels" / "cifar10"
    parser.add_argument("--data", type=Path, default=Path(cache), metavar="FOLDER", help="CIFAR-10 (%(default)s)")
    name = time.strftime("runs/demo-ddp-%Y%m%d-%H%M%S")
    parser.add_argument("--output", type=Path, default=Path(name), metavar="FOLDER", help="for runs and report")
    parser.add_argument("--train", metavar="RUN", help=argparse.SUPPRESS)  # what the processes are started with
    args = parser.parse_args(argv)
    try:
        if args.train:
            with joined(torch.device("cpu")):
                train(
                    *(open_dataset("cifar10", args.data, split) for split in ("train", "val")), args.output / args.train
                )
            return 0
        if args.output.exists():
            raise FileExistsError(f"{args.output} is there already: name another folder with --output")
        fetch_cifar10(args.data)
        for run, processes in (("one-process", 1), ("two-processes", 2)):
            print(f"{run}: {processes} x {BATCH_SIZE // processes} images in a batch", flush=True)
            start(processes, ["--data", str(args.data), "--output", str(args.output), "--train", run])
        return 0 if compare(args.output) else 1
    except (OSError, ValueError, ModuleNotFoundError, subprocess.CalledProcessError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1


def start(processes: int, words: Sequence[str]) -> None:
    """Run this module's training in as many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else ()), "-m", __spec__.name, *words]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def train(photographs: ImageArrays, test: ImageArrays, folder: Path) -> None:
    """One run, by as many processes as have joined."""
    torch.set_num_threads(1)
    student, model = create_student(len(photographs.classes), seed=0), load_efficientnet_lite0()
    teacher = create_extractor(
        model.to(memory_format=torch.channels_last),
        [1, 2, 3, 4],
        image_size=TEACHER_IMAGE_SIZE,
        preprocess=TeacherInput(student.model, model, TEACHER_IMAGE_SIZE),
    )
    distiller = Distiller(student, teacher, build_lfcc(student, teacher, scales=(1, 2)), alpha=0)
    transforms = resolve_data_config({"input_size": (3, 32, 32)}, model=student.model)
    batches = TrainBatches(
        some(photographs, IMAGES),
        create_transform(**transforms, is_training=True, scale=(0.5, 1.0)),
        batch_size=BATCH_SIZE // world_size(),
        seed=0,
        rank=rank(),
        world_size=world_size(),
    )
    loader = evaluation_loader(
        some(test, TEST_IMAGES),
        create_transform(**transforms),
        batch_size=BATCH_SIZE,
        rank=rank(),
        world_size=world_size(),
    )
    settings = FitSettings(epochs=EPOCHS, lr=2e-3, warmup_epochs=0.3, log_interval=5)
    fit(distiller, batches, partial(top1, loader=loader, num_classes=len(test.classes)), settings, RunFolder(folder))


def some(images: ImageArrays, number: int) -> ImageArrays:
    """The first images of a set."""
    return ImageArrays(images.images[:number], images.labels[:number], images.classes)


def compare(output: Path) -> bool:
    """Print and draw both curves; whether they are one."""
    folders = [output / "one-process", output / "two-processes"]
    one, two = (read_csv(folder / "steps.csv") for folder in folders)
    apart = [abs(b["loss"] - a["loss"]) / a["loss"] for a, b in zip(one, two, strict=True)]
    rows = [
        {
            "update": f"{a['step']:.0f}",
            "one process": f"{a['loss']:.6f}",
            "two processes": f"{b['loss']:.6f}",
            "apart by": f"{difference:.1e}",
        }
        for a, b, difference in zip(one, two, apart, strict=True)
    ]
    together = max(apart) <= TOLERANCE
    speeds = [read_csv(folder / "summary.csv")[-1]["images_per_second"] for folder in folders]
    verdict = (
        f"The loss of two processes {'lies on' if together else 'parts from'} that of one: over {rows[-1]['update']} "
        f"updates they are apart by {max(apart):.1e} of its value at most. One process took {speeds[0]:.0f} images/s, "
        f"two {speeds[1]:.0f}."
    )
    page = write_report(folders, output, title="One process and two", text=[verdict], table=rows)
    print("", text_table(rows), "", verdict, f"The page with the curves: {page}", sep="\n")
    return together


if __name__ == "__main__":
    sys.exit(main())
