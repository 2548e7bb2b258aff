"""`lfcc cache`: writes the teacher cache of a run."""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from tqdm import tqdm

from .build import (
    choose_device,
    create_distiller,
    create_student,
    create_teacher,
    fit_settings,
    identity_of,
    open_split,
)
from .config import create_parser, merge, read_yaml
from .data.evaluation import EvaluationImages
from .data.readers import Stream
from .distiller import TeacherOutputs
from .distributed import barrier, distributed_context, is_main
from .models import check_classes
from .teacher_cache import CacheWriter, Manifest, TeacherCache, format_bytes, prepare

_TIMED_IMAGES = 512  # images that are read to measure the speed of the cache


def cache(argv: Sequence[str]) -> None:
    """Run `lfcc cache` with these arguments: the folder and the options of the run.

    Writes the parts that are missing in the folder. Raises CacheError for a folder with another cache, OSError if the
    disk is too small or full, and the errors of `lfcc distill` for its options.
    """
    folder, args = _parse(argv)
    device = choose_device(args.device)
    with distributed_context(device):
        _cache(folder, args, device)


def _parse(argv: Sequence[str]) -> tuple[Path, argparse.Namespace]:
    parser = create_parser()
    parser.prog = "lfcc cache"
    parser.usage = "%(prog)s DIR [option ...]"
    parser.description = (
        "Store a teacher's logits and pooled features of all training images in DIR, for `lfcc distill --teacher-cache "
        "DIR`. Takes the options of that run and ignores those of the student's training. An interrupted command "
        "continues when it is run again."
    )
    parser.add_argument(
        "--cache-dtype", choices=("float16", "float32"), default="float16", help="dtype of the cached values"
    )
    # The folder comes first, since some options take any number of values.
    if not argv or argv[0].startswith("-"):
        parser.parse_known_args(argv)  # --help ends here
        parser.error("the first argument must be DIR, the folder of the cache")
    config_file = parser.parse_args(argv[1:]).config
    args = merge(parser, argv[1:], read_yaml(config_file) if config_file else {})
    if args.student is None:
        raise ValueError("--student is required: it defines the preprocessing")
    if not (args.kd_alpha or args.lfcc_beta):
        raise ValueError("--kd-alpha and --lfcc-beta are 0, so there is nothing to cache: set one of them")
    return Path(argv[0]), args


def _cache(folder: Path, args: argparse.Namespace, device: torch.device) -> None:
    dataset = open_split(args, "train")
    classes = len(dataset.classes)
    student, data_config = create_student(args, classes)
    identity = identity_of(args, data_config, dataset)
    assert not isinstance(dataset, Stream)  # for which `identity_of` raises
    image_size = data_config["input_size"][-1]
    teacher = create_teacher(args, student, classes, image_size).to(device)
    distiller = create_distiller(args, student, teacher, image_size).to(device)
    # Fails now instead of after the cache is written.
    check_classes(args.dataset, dataset.classes, dataset.classes, teacher.num_classes if args.kd_alpha else None)
    settings = fit_settings(args)

    @torch.no_grad()
    def teacher_outputs(images: Tensor) -> TeacherOutputs:
        if settings.channels_last:
            images = images.to(memory_format=torch.channels_last)
        with settings.autocast(device):
            logits, features = teacher(images)
            # Logits are stored even with --kd-alpha 0: they are small, and another run may need them.
            return TeacherOutputs(logits, distiller.lfcc.teacher_pyramids(features) if distiller.lfcc else None)

    probe = teacher_outputs(torch.zeros(1, *data_config["input_size"], device=device))
    manifest = Manifest(
        identity=identity,
        taps=teacher.taps,
        num_classes=probe.logits.shape[1],
        cells=probe.pyramids[0].shape[1] if probe.pyramids else 0,
        images=len(dataset),
        precision=str(settings.precision(device)).removeprefix("torch."),
        dtype=args.cache_dtype,
    )
    if is_main():
        missing = prepare(folder, manifest)
        _print_plan(folder, manifest, missing)
    barrier()
    writer = CacheWriter(folder, manifest, EvaluationImages(dataset, create_transform(**data_config)), teacher_outputs)
    shown = is_main() and sys.stderr.isatty()
    images = sum(len(manifest.of_part(part)) for part in writer.parts)
    with tqdm(desc="rank 0", total=images, unit="image", disable=not shown) as bar:
        writer.write(batch_size=args.batch_size, workers=args.workers, device=device, progress=bar.update)
    if is_main():
        _print_speed(TeacherCache.open(folder), writer, device)


def _print_plan(folder: Path, manifest: Manifest, missing: Sequence[int]) -> None:
    row = manifest.num_bytes(1) / (1 + manifest.flips)
    print(
        f"{folder}: {manifest.images} images{' and their flips' if manifest.flips else ''}, {format_bytes(row)} per "
        f"row in {manifest.dtype}, {format_bytes(manifest.num_bytes(manifest.images))} in total; {len(missing)} of "
        f"{manifest.parts} parts to write; {format_bytes(shutil.disk_usage(folder).free)} free",
        flush=True,
    )


def _print_speed(cache: TeacherCache, writer: CacheWriter, device: torch.device) -> None:
    chosen = np.random.default_rng(0).integers(len(cache), size=_TIMED_IMAGES)
    started = time.perf_counter()
    cache.outputs(torch.stack([cache.row(int(index), flipped=False) for index in chosen]))
    read = _TIMED_IMAGES / (time.perf_counter() - started)
    line = f"{cache.folder} is complete: reads {read:.4g} images/s per process"
    if writer.views:
        computed = writer.views / writer.seconds
        line += f", {read / computed:.3g}x the teacher on {device} ({computed:.4g} images/s)"
    print(line)
