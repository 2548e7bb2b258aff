"""What a teacher cache depends on, found without loading the teacher.

`lfcc cache` keeps it with the cache, and a run that uses the cache requires the same.
"""

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch.utils.data import Dataset

from .data import fingerprint


def identity_of(args: argparse.Namespace, data_config: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    """Teacher, preprocessing and data of a run as nested plain values; "pyramids" and "flips" where it needs them.

    `args` are the options of `lfcc distill`, `data_config` is timm's of the student, `dataset` the training images.
    Raises FileNotFoundError where there is no teacher checkpoint, ValueError for a data set without random access.
    """
    identity = {
        "teacher": {
            "model": args.teacher,
            "kwargs": args.teacher_kwargs,
            "weights": _weights(args.teacher, args.teacher_checkpoint),
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
    if args.hflip:
        identity["flips"] = True
    return identity


def _weights(model: str, checkpoint: str | None) -> str | None:
    """A hash of the checkpoint, or where timm gets its weights from."""
    if checkpoint is None:
        try:
            pretrained = timm.models.get_pretrained_cfg(model)
        except RuntimeError as error:  # a tag that timm does not know
            raise ValueError(f"--teacher {model}: {error}") from error
        return pretrained and (pretrained.hf_hub_id or pretrained.url or pretrained.file)
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"no teacher checkpoint at {checkpoint}")
    digest = hashlib.sha256()
    with Path(checkpoint).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
