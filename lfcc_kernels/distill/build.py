"""From the options of a run to its device, data and models; `lfcc distill` and `lfcc cache` share them."""

import argparse
from dataclasses import fields
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn
from torch.utils.data import Dataset

from .data import open_dataset
from .distiller import Distiller, Tapped, build_lfcc
from .features import FeatureExtractor, create_extractor
from .models import TeacherInput, create_model, load_teacher
from .ranks import local_rank
from .readers import Stream
from .settings import FitSettings


def choose_device(name: str | None) -> torch.device:
    """The device of this process: by name, else its own GPU, else the CPU.

    Raises ValueError where it cannot be used.
    """
    try:
        default = f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"
        device = torch.empty(0, device=name or default).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def open_split(args: argparse.Namespace, split: str) -> Dataset | Stream:
    """The data set of the options, "train" or "val"."""
    return open_dataset(
        args.dataset,
        args.data_dir,
        split,
        split_name=args.train_split if split == "train" else args.val_split,
        num_classes=args.num_classes,
        input_key=args.input_key,
        target_key=args.target_key,
    )


def fit_settings(args: argparse.Namespace) -> FitSettings:
    return FitSettings(**{field.name: getattr(args, field.name) for field in fields(FitSettings)})


def create_student(args: argparse.Namespace, classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """The student, and timm's data config by which its images are prepared."""
    student = create_model(args.student, image_size=args.img_size, num_classes=classes, **args.student_kwargs)
    return student, resolve_data_config({"img_size": args.img_size, "crop_pct": args.crop_pct}, model=student)


def create_teacher(
    args: argparse.Namespace, student: nn.Module, classes: int, image_size: int
) -> FeatureExtractor | None:
    """The teacher with its taps, or None where no term of the loss needs one."""
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


def create_distiller(
    args: argparse.Namespace, student: nn.Module, teacher: Tapped | None, image_size: int
) -> Distiller:
    """The distiller with its losses; a teacher that is no model gives its outputs with the batches."""
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
        teacher if isinstance(teacher, FeatureExtractor) else None,
        lfcc,
        alpha=args.kd_alpha,
        beta=args.lfcc_beta,
        kd_temperature=args.kd_temperature,
        label_smoothing=args.smoothing,
    )
