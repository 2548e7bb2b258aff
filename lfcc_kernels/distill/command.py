"""`lfcc distill` and `lfcc inspect`: from options to models, data and `fit`."""

import argparse
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_data_config
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader

from .checkpoint import load_checkpoint
from .config import as_config, create_parser, merge, read_yaml
from .data import open_dataset
from .distiller import Distiller, build_lfcc
from .features import FeatureExtractor, available_taps, create_extractor, default_taps
from .loader import EvaluationImages, TrainBatches, top1
from .loop import FitSettings, fit
from .models import TeacherInput, check_classes, create_model, load_teacher
from .run_folder import RunFolder

# Options that do not change what is computed.
_FREE_ON_RESUME = {
    "data_dir",
    "workers",
    "device",
    "log_interval",
    "checkpoint_interval",
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
    if checkpoint is None:
        name = f"{args.student}-{args.teacher or 'labels'}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = RunFolder(Path(args.output) / (args.experiment or name))
        run.require_empty()
    _train(args, run, checkpoint)


def _require_same_run(config: Mapping[str, Any], started: Mapping[str, Any]) -> None:
    """Raises ValueError where a resumed run would no longer be the run that was started."""
    for name in config.keys() - _FREE_ON_RESUME:
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


def _train(args: argparse.Namespace, run: RunFolder, checkpoint: Mapping[str, Any] | None) -> None:
    device = _device(args.device)
    random_seed(args.seed)
    train, val = (open_dataset(args.dataset, args.data_dir, split) for split in ("train", "val"))
    classes = len(train.classes)
    student = create_model(args.student, image_size=args.img_size, num_classes=classes, **args.student_kwargs)
    data_config = resolve_data_config({"img_size": args.img_size}, model=student)
    teacher = _create_teacher(args, student, classes, data_config["input_size"][-1])
    check_classes(
        args.dataset,
        train.classes,
        val.classes,
        teacher.model.num_classes if args.kd_alpha and teacher else None,
    )
    distiller = _create_distiller(args, student, teacher, data_config["input_size"][-1]).to(device)
    settings = FitSettings(**{field.name: getattr(args, field.name) for field in fields(FitSettings)})
    train_batches = TrainBatches(
        train,
        create_transform(
            **data_config,
            is_training=True,
            no_aug=not args.aug,
            scale=args.scale,
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
        ),
        batch_size=args.batch_size,
        seed=args.seed,
        workers=args.workers,
        device=device,
    )
    val_images = EvaluationImages(val, create_transform(**data_config))
    val_loader = DataLoader(val_images, args.batch_size, num_workers=args.workers, generator=torch.Generator())
    evaluate = functools.partial(top1, loader=val_loader, num_classes=classes)

    precision = str(settings.precision(device)).removeprefix("torch.")
    print(f"{run.root}: {len(train)} training and {len(val)} validation images, on {device} in {precision}")
    if teacher is not None:
        teacher.to(device)
        if args.kd_alpha and checkpoint is None:
            print(f"teacher  top1 {evaluate(nn.Sequential(teacher.preprocess, teacher.model)):.4g}")
    fit(distiller, train_batches, evaluate, settings, run, checkpoint=checkpoint, config=as_config(args))


def _device(name: str | None) -> torch.device:
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def _create_teacher(
    args: argparse.Namespace, student: nn.Module, classes: int, image_size: int
) -> FeatureExtractor | None:
    if not (args.kd_alpha or args.lfcc_beta):
        return None
    if args.teacher is None:
        raise ValueError("no teacher: name a timm model with --teacher, or set --kd-alpha 0 --lfcc-beta 0")
    size = args.teacher_img_size or image_size
    model = load_teacher(args.teacher, args.teacher_checkpoint, classes, image_size=size, **args.teacher_kwargs)
    return create_extractor(
        model.eval(),
        args.teacher_taps if args.lfcc_beta else (),
        image_size=size,
        preprocess=TeacherInput(student, model, size),
    )


def _create_distiller(
    args: argparse.Namespace, student: nn.Module, teacher: FeatureExtractor | None, image_size: int
) -> Distiller:
    extractor = create_extractor(student, args.student_taps if args.lfcc_beta else (), image_size=image_size)
    lfcc = None
    if args.lfcc_beta:
        lfcc = build_lfcc(
            extractor,
            teacher,
            scales=args.lfcc_scales,
            temperature=args.lfcc_temperature,
            direction=args.lfcc_direction,
            student_filter=args.lfcc_student_filter,
            teacher_filter=args.lfcc_teacher_filter,
            learnable_temperature=args.lfcc_learnable_temperature,
        )
    return Distiller(
        extractor,
        teacher,
        lfcc,
        alpha=args.kd_alpha,
        beta=args.lfcc_beta,
        kd_temperature=args.kd_temperature,
    )


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
