"""Creates device, data and models of a run from its options; used by `lfcc distill` and `lfcc cache`."""

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from .config import FitSettings
from .data import fingerprint, open_dataset
from .data.readers import ImageDataset, Stream
from .distiller import Distiller, HasTaps, build_lfcc
from .distributed import local_rank
from .features import FeatureExtractor, create_extractor
from .models import TeacherInput, create_model, load_teacher


def choose_device(name: str | None) -> torch.device:
    """The device `name`, by default the GPU of this process, or the CPU without a GPU.

    Raises ValueError if it cannot be used.
    """
    default = f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name or default).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name or default} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def open_split(args: argparse.Namespace, split: str) -> ImageDataset | Stream:
    """The split "train" or "val" of the data set."""
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
    """The student, and timm's data config of its images."""
    student = create_model(args.student, image_size=args.img_size, num_classes=classes, **args.student_kwargs)
    return student, resolve_data_config({"img_size": args.img_size, "crop_pct": args.crop_pct}, model=student)


def create_teacher(
    args: argparse.Namespace, student: nn.Module, classes: int, image_size: int
) -> FeatureExtractor | None:
    """The teacher with its taps, or None if no term of the loss needs it."""
    if not (args.kd_alpha or args.lfcc_beta):
        return None
    if args.teacher is None:
        raise ValueError(
            "--teacher is required: name a timm model, or set --kd-alpha 0 --lfcc-beta 0 to train without a teacher"
        )
    size = args.teacher_img_size or image_size
    model = load_teacher(args.teacher, args.teacher_checkpoint, classes, image_size=size, **args.teacher_kwargs)
    return create_extractor(
        model.eval(),
        args.teacher_taps if args.lfcc_beta else (),
        image_size=size,
        preprocess=TeacherInput(student, model, size),
    )


def create_distiller(
    args: argparse.Namespace, student: nn.Module, teacher: HasTaps | None, image_size: int
) -> Distiller:
    """The distiller with its losses. `teacher` may be a teacher cache, whose outputs come with the batches."""
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


def identity_of(
    args: argparse.Namespace, data_config: Mapping[str, Any], dataset: ImageDataset | Stream
) -> dict[str, Any]:
    """What the teacher's outputs of a run depend on, as nested plain values; does not load the teacher.

    `args` are the options of `lfcc distill`, `data_config` is timm's for the student, `dataset` the training images.
    "pyramids" and "flips" are included if the run needs them. Raises FileNotFoundError if the teacher's checkpoint does
    not exist, ValueError for a data set without random access.
    """
    identity = {
        "teacher": {
            "model": args.teacher,
            "kwargs": args.teacher_kwargs,
            "weights": _identify_weights(args.teacher, args.teacher_checkpoint),
            "image_size": args.teacher_img_size or data_config["input_size"][-1],
        },
        "preprocessing": dict(data_config),
        "data": {
            "set": args.dataset,
            "split": args.train_split,
            "images": len(dataset),
            "fingerprint": fingerprint(dataset),
        },
    }
    if args.lfcc_beta:
        identity["pyramids"] = {
            "taps": args.teacher_taps or "the default",
            "scales": args.lfcc_scales,
            "filter": args.lfcc_teacher_filter,
        }
    return identity | ({"flips": True} if args.hflip else {})


def _identify_weights(model: str, checkpoint: str | None) -> str | None:
    """The hash of the checkpoint, or the source of timm's weights."""
    if checkpoint is None:
        try:
            pretrained = timm.models.get_pretrained_cfg(model)
        except RuntimeError as error:  # a tag that timm does not know
            raise ValueError(f"--teacher {model}: {error}") from error
        return pretrained and (pretrained.hf_hub_id or pretrained.url or pretrained.file)
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"--teacher-checkpoint {checkpoint} does not exist")
    digest = hashlib.sha256()
    with Path(checkpoint).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
