"""`lfcc distill` and `lfcc inspect`: from options to models, data and `fit`."""

import argparse
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup, create_transform, resolve_data_config
from timm.utils import random_seed
from torch import nn
from torch.utils.data import Dataset

from .batches import Batches
from .build import choose_device, create_distiller, create_student, create_teacher, fit_settings, open_split
from .cache import TeacherCache
from .cache_identity import identity_of
from .checkpoint import load_checkpoint
from .config import as_config, create_parser, merge, read_yaml
from .features import available_taps, default_taps
from .loader import TrainBatches, evaluation_loader, top1
from .loop import fit
from .models import check_classes, create_model
from .ranks import from_main, is_main, joined, rank, world_size
from .readers import STREAMED, Stream
from .run_folder import RunFolder
from .sampling import loader_errors
from .streams import StreamedBatches

# Options that do not change what is computed.
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
    """Run `lfcc distill` with these words. Bad input raises before anything is written."""
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
        raise ValueError("no student: name a timm model with --student")
    device = choose_device(args.device)
    with joined(device):
        if checkpoint is None:
            name = f"{args.student}-{args.teacher or 'labels'}-{time.strftime('%Y%m%d-%H%M%S')}"
            run = RunFolder(Path(args.output) / (args.experiment or from_main(name)))
            run.require_empty()
        _train(args, run, checkpoint, device)


def _require_same_run(config: Mapping[str, Any], started: Mapping[str, Any]) -> None:
    """Raises ValueError where a resumed run would no longer be the run that was started."""
    streamed = config["dataset"].split("/")[0] in STREAMED  # then each loader process has images of its own
    for name in config.keys() - (_FREE_ON_RESUME - {"workers"} if streamed else _FREE_ON_RESUME):
        if config[name] != started.get(name):
            raise ValueError(
                f"--{name.replace('_', '-')} is {config[name]} and was {started.get(name)}: a run goes on "
                "with the options it was started with; leave it out, or start a new run"
            )


def find_checkpoint(resume: str, output: str, experiment: str | None) -> Path:
    """What --resume means: a file RUN/checkpoints/NAME.pt, a run folder, or "latest" under `output`."""
    if resume == "latest":
        found = list(Path(output).glob(f"{experiment or '*'}/checkpoints/last.pt"))
        if not found:
            raise FileNotFoundError(f"no checkpoint to resume under {Path(output) / (experiment or '')}")
        return max(found, key=lambda path: path.stat().st_mtime)
    path = RunFolder(resume).last if Path(resume).is_dir() else Path(resume)
    if path.is_file() and path.absolute().parent.name != "checkpoints":
        raise ValueError(f"{path} is not in a run folder; a run goes on from RUN/checkpoints/last.pt")
    return path.absolute()


def _train(
    args: argparse.Namespace, run: RunFolder, checkpoint: Mapping[str, Any] | None, device: torch.device
) -> None:
    random_seed(args.seed)  # the same weights on all ranks
    train, val = (open_split(args, split) for split in ("train", "val"))
    classes = len(train.classes)
    student, data_config = create_student(args, classes)
    image_size = data_config["input_size"][-1]
    cache = _open_cache(args, data_config, train)
    teacher = cache or create_teacher(args, student, classes, image_size)
    head = None if teacher is None else teacher.num_classes if cache else teacher.model.num_classes
    check_classes(args.dataset, train.classes, val.classes, head if args.kd_alpha else None)
    random_seed(args.seed)  # the same projections, whether a teacher was made before or not
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
        images = f"{len(train)} training and {len(val)} validation images"
        processes = f"{world_size()} processes, first " if world_size() > 1 else ""
        print(f"{run.root}: {images}, on {processes}{device} in {precision}")
    if distiller.teacher is not None:
        teacher.to(device)
        if args.kd_alpha and checkpoint is None:
            accuracy = evaluate(nn.Sequential(teacher.preprocess, teacher.model))
            if is_main():
                print(f"teacher  top1 {accuracy:.4g}", flush=True)
    random_seed(args.seed, rank())  # dropout of its own on each
    with loader_errors():
        fit(distiller, batches, evaluate, settings, run, checkpoint=checkpoint, config=as_config(args))


def _open_cache(args: argparse.Namespace, data_config: Mapping[str, Any], train: Dataset) -> TeacherCache | None:
    """The cache in the teacher's place, after a check that it is this run's."""
    if args.teacher_cache is None or not (args.kd_alpha or args.lfcc_beta):
        return None
    if args.aug or args.mixup or args.cutmix:
        raise ValueError(
            "--teacher-cache holds what the teacher says of images as validation sees them, and of their flips: give "
            "--no-aug, without --mixup and --cutmix"
        )
    cache = TeacherCache.open(args.teacher_cache)
    cache.require(identity_of(args, data_config, train))
    return cache


def _create_batches(
    args: argparse.Namespace,
    train: Dataset | Stream,
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


def inspect_model(name: str, image_size: int | None = None) -> str:
    """A table of a timm model's taps: width, grid, stride, layout; a star marks the default ones."""
    model = create_model(name, image_size=image_size)
    size = resolve_data_config({"img_size": image_size}, model=model)["input_size"][-1]
    taps = available_taps(model, size)
    chosen = default_taps(taps)
    rows = [("tap", "module", "channels", "grid", "stride", "layout")]
    rows += [
        (
            f"{tap.name}{'*' if tap in chosen else ''}",
            tap.module,
            str(tap.channels),
            f"{tap.grid[0]} x {tap.grid[1]}",
            f"{size / tap.grid[0]:.4g}",
            tap.layout,
        )
        for tap in taps
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [
            f"{name} at {size} x {size} pixels: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M "
            f"parameters, {taps[0].prefix_tokens} prefix tokens (cut off before the taps)",
            *lines,
            "* the default of `lfcc distill`",
        ]
    )
