"""`lfcc distill`: creates models and data from the options, and calls `fit`."""

import argparse
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup, create_transform
from timm.utils import random_seed
from torch import nn

from .build import (
    choose_device,
    create_distiller,
    create_student,
    create_teacher,
    fit_settings,
    identity_of,
    open_split,
)
from .checkpoint import load_checkpoint
from .config import as_config, create_parser, merge, read_yaml
from .data.evaluation import evaluation_loader, top1
from .data.loader import Batches, TrainBatches
from .data.readers import STREAMED, ImageDataset, Stream, loader_errors
from .data.streams import StreamedBatches
from .distributed import broadcast_object, distributed_context, is_main, rank, world_size
from .loop import fit
from .models import check_classes
from .run_folder import RunFolder
from .teacher_cache import TeacherCache

# Options that do not change the result.
_FREE_ON_RESUME = {
    "data_dir",
    "workers",
    "device",
    "log_interval",
    "checkpoint_interval",
    "checkpoint_hist",
    "output",
    "experiment",
}


def distill(argv: Sequence[str]) -> None:
    """Run `lfcc distill` with these arguments. Invalid input raises before any file is written."""
    parser = create_parser()
    config_file = parser.parse_args(argv).config
    config = read_yaml(config_file) if config_file else {}
    args, checkpoint = merge(parser, argv, config), None
    if args.resume:
        path = find_checkpoint(args.resume, args.output, args.experiment)
        checkpoint, run = load_checkpoint(path), RunFolder(path.parent.parent)
        args = merge(parser, argv, checkpoint["config"], config)
        _require_same_run(as_config(args), checkpoint["config"])
    if args.student is None:
        raise ValueError("--student is required: name a timm model")
    device = choose_device(args.device)
    with distributed_context(device):
        if checkpoint is None:
            name = f"{args.student}-{args.teacher or 'labels'}-{time.strftime('%Y%m%d-%H%M%S')}"
            run = RunFolder(Path(args.output) / (args.experiment or broadcast_object(name)))
            run.require_empty()
        _train(args, run, checkpoint, device)


def _require_same_run(config: Mapping[str, Any], started: Mapping[str, Any]) -> None:
    """Raises ValueError if an option differs from the checkpoint and changes the result."""
    streamed = config["dataset"].split("/")[0] in STREAMED  # the order depends on the number of workers
    for name in config.keys() - (_FREE_ON_RESUME - {"workers"} if streamed else _FREE_ON_RESUME):
        if config[name] != started.get(name):
            raise ValueError(
                f"--{name.replace('_', '-')} is {config[name]} but the checkpoint has {started.get(name)}: omit the "
                "option to resume, or start a new run"
            )


def find_checkpoint(resume: str, output: str, experiment: str | None) -> Path:
    """The checkpoint of --resume: a file RUN/checkpoints/NAME.pt, a run folder, or "latest" in `output`."""
    if resume == "latest":
        found = list(Path(output).glob(f"{experiment or '*'}/checkpoints/last.pt"))
        if not found:
            raise FileNotFoundError(f"--resume latest: no checkpoint in {Path(output) / (experiment or '')}")
        return max(found, key=lambda path: path.stat().st_mtime)
    path = RunFolder(resume).last if Path(resume).is_dir() else Path(resume)
    if path.is_file() and path.absolute().parent.name != "checkpoints":
        raise ValueError(f"--resume {path} is not in a run folder, expected RUN/checkpoints/NAME.pt")
    return path.absolute()


def _train(
    args: argparse.Namespace, run: RunFolder, checkpoint: Mapping[str, Any] | None, device: torch.device
) -> None:
    random_seed(args.seed)  # same weights on all ranks
    train, val = (open_split(args, split) for split in ("train", "val"))
    classes = len(train.classes)
    student, data_config = create_student(args, classes)
    image_size = data_config["input_size"][-1]
    cache = _open_cache(args, data_config, train)
    teacher = cache or create_teacher(args, student, classes, image_size)
    head = None if teacher is None else teacher.num_classes
    check_classes(args.dataset, train.classes, val.classes, head if args.kd_alpha else None)
    random_seed(args.seed)  # same projections with a teacher and with a cache
    distiller = create_distiller(args, student, teacher, image_size).to(device)
    settings = fit_settings(args)
    batches = _create_batches(args, train, data_config, cache, device)
    val_loader = evaluation_loader(
        val,
        create_transform(**data_config),
        batch_size=args.batch_size,
        workers=args.workers,
        rank=rank(),
        world_size=world_size(),
    )
    evaluate = functools.partial(top1, loader=val_loader, num_classes=classes)

    if is_main():
        precision = str(settings.precision(device)).removeprefix("torch.")
        processes = f"{world_size()} processes, rank 0 on " if world_size() > 1 else ""
        images = f"{len(train)} training images, {len(val)} validation images"
        print(f"{run.root}: {images}, {processes}{device}, {precision}")
    if distiller.teacher is not None:
        teacher.to(device)
        if args.kd_alpha and checkpoint is None:
            accuracy = evaluate(nn.Sequential(teacher.preprocess, teacher.model))
            if is_main():
                print(f"teacher  top1 {accuracy:.4g}", flush=True)
    random_seed(args.seed, rank())  # different dropout on each rank
    with loader_errors():
        fit(distiller, batches, evaluate, settings, run, checkpoint=checkpoint, config=as_config(args))


def _open_cache(
    args: argparse.Namespace, data_config: Mapping[str, Any], train: ImageDataset | Stream
) -> TeacherCache | None:
    """The teacher cache of this run, after a check of its identity; None without one."""
    if args.teacher_cache is None or not (args.kd_alpha or args.lfcc_beta):
        return None
    if args.aug or args.mixup or args.cutmix:
        raise ValueError(
            "--teacher-cache was made without augmentation except flips: add --no-aug and drop --mixup and --cutmix"
        )
    cache = TeacherCache.open(args.teacher_cache)
    cache.require(identity_of(args, data_config, train))
    return cache


def _create_batches(
    args: argparse.Namespace,
    train: ImageDataset | Stream,
    data_config: Mapping[str, Any],
    cache: TeacherCache | None,
    device: torch.device,
) -> Batches:
    mix = None
    if args.mixup or args.cutmix:
        mix = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            label_smoothing=args.smoothing,
            num_classes=len(train.classes),
        )
    training = {
        "is_training": True,
        "no_aug": not args.aug,
        "scale": args.scale,
        "hflip": args.hflip,
        "color_jitter": args.color_jitter,
        "auto_augment": args.aa,
        "re_prob": args.reprob,
        "re_mode": "pixel",
    }
    transform = create_transform(**data_config, **({} if cache else training))
    options = {
        "batch_size": args.batch_size,
        "seed": args.seed,
        "workers": args.workers,
        "device": device,
        "rank": rank(),
        "world_size": world_size(),
        "mix": mix,
    }
    if isinstance(train, Stream):
        return StreamedBatches(train, transform, **options)
    return TrainBatches(train, transform, **options, cache=cache, hflip=args.hflip)
