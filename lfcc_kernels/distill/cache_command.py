"""`lfcc cache`: from the options of a run to the cache that takes its teacher's place."""

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

from .build import choose_device, create_distiller, create_student, create_teacher, fit_settings, open_split
from .cache import Manifest, TeacherCache
from .cache_identity import identity_of
from .cache_writer import CacheWriter, in_units, prepare
from .config import create_parser, merge, read_yaml
from .distiller import TeacherOutputs
from .loader import EvaluationImages
from .models import check_classes
from .ranks import barrier, is_main, joined

_READ_BACK = 512  # images in the sample that is timed


def cache(argv: Sequence[str]) -> None:
    """Run `lfcc cache` with these words: the folder, and the options of the run.

    Makes what is missing in the folder. Raises CacheError for a folder with another cache, OSError where the disk is
    too small or full, and what `lfcc distill` raises for its options.
    """
    folder, args = _parse(argv)
    device = choose_device(args.device)
    with joined(device):
        _cache(folder, args, device)


def _parse(argv: Sequence[str]) -> tuple[Path, argparse.Namespace]:
    parser = create_parser()
    parser.prog = "lfcc cache"
    parser.usage = "%(prog)s DIR [option ...]"
    parser.description = (
        "Keep a teacher's logits and pooled features of all training images in DIR, for `lfcc distill --teacher-cache "
        "DIR` with the same options; what such a run does with a student, or while it trains, is not looked at. "
        "Started again, it makes what is missing."
    )
    parser.add_argument("--cache-dtype", choices=("float16", "float32"), default="float16", help="of the cached values")
    # First, as some options take any number of words.
    if not argv or argv[0].startswith("-"):
        parser.parse_known_args(argv)  # --help ends here
        parser.error("the first word must be the folder for the cache")
    config_file = parser.parse_args(argv[1:]).config
    args = merge(parser, argv[1:], read_yaml(config_file) if config_file else {})
    if args.student is None:
        raise ValueError("no student, whose preprocessing the teacher's images have: name it with --student")
    if not (args.kd_alpha or args.lfcc_beta):
        raise ValueError("nothing to cache: --kd-alpha and --lfcc-beta are 0")
    return Path(argv[0]), args


def _cache(folder: Path, args: argparse.Namespace, device: torch.device) -> None:
    dataset = open_split(args, "train")
    classes = len(dataset.classes)
    student, data_config = create_student(args, classes)
    identity = identity_of(args, data_config, dataset)
    image_size = data_config["input_size"][-1]
    teacher = create_teacher(args, student, classes, image_size).to(device)
    distiller = create_distiller(args, student, teacher, image_size).to(device)
    # Known here, it need not be found out from the finished cache.
    check_classes(args.dataset, dataset.classes, dataset.classes, teacher.model.num_classes if args.kd_alpha else None)
    settings = fit_settings(args)

    @torch.no_grad()
    def teach(images: Tensor) -> TeacherOutputs:
        if settings.channels_last:
            images = images.to(memory_format=torch.channels_last)
        with settings.autocast(device):
            logits, features = teacher(images)
            # The logits are kept whatever they weigh: they take little room, and the next run may want them.
            return TeacherOutputs(logits, distiller.lfcc.teacher_pyramids(features) if distiller.lfcc else None)

    probe = teach(torch.zeros(1, *data_config["input_size"], device=device))
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
    writer = CacheWriter(folder, manifest, EvaluationImages(dataset, create_transform(**data_config)), teach)
    shown = is_main() and sys.stderr.isatty()
    images = sum(len(manifest.of_part(part)) for part in writer.parts)
    with tqdm(desc="rank 0", total=images, unit="image", disable=not shown) as bar:
        writer.write(batch_size=args.batch_size, workers=args.workers, device=device, progress=bar.update)
    if is_main():
        _print_speed(TeacherCache.open(folder), writer, device)


def _print_plan(folder: Path, manifest: Manifest, missing: Sequence[int]) -> None:
    row = manifest.bytes_of_images(1) / (1 + manifest.flips)
    print(
        f"{folder}: {manifest.images} images{' and their flips' if manifest.flips else ''}, {in_units(row)} a row in "
        f"{manifest.dtype}, {in_units(manifest.bytes_of_images(manifest.images))} in all; {len(missing)} of "
        f"{manifest.parts} parts to make; {in_units(shutil.disk_usage(folder).free)} free",
        flush=True,
    )


def _print_speed(cache: TeacherCache, writer: CacheWriter, device: torch.device) -> None:
    chosen = np.random.default_rng(0).integers(len(cache), size=_READ_BACK)
    began = time.perf_counter()
    cache.outputs(torch.stack([cache.row(int(index), flipped=False) for index in chosen]))
    read = _READ_BACK / (time.perf_counter() - began)
    line = f"{cache.folder} is complete; it gives {read:.4g} images/s to a process"
    if writer.views:
        taught = writer.views / writer.seconds
        line += f", the teacher on {device} {taught:.4g}: {read / taught:.3g} times as fast"
    print(line)
