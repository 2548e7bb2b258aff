"""Teacher caches: contents, writing, resuming, and errors."""

import errno
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo import in_ranks
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from toy_runs import CLASSES, Interrupted, make_distiller

from lfcc_kernels import files
from lfcc_kernels.distill import TeacherOutputs
from lfcc_kernels.distill.teacher_cache import CacheError, CacheWriter, Manifest, TeacherCache, prepare

IMAGES = 11  # in parts of 4: two full parts and a short one
DISTILLER = make_distiller()
MANIFEST = Manifest(
    identity={"teacher": {"model": "test_resnet", "weights": "toy"}, "flips": True},
    taps=DISTILLER.teacher.taps,
    num_classes=CLASSES,
    cells=1 + 4,
    images=IMAGES,
    precision="float32",
    images_per_part=4,
)


def images() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(IMAGES, 3, 32, 32, generator=generator), torch.zeros(IMAGES))


def make(
    folder: Path, manifest: Manifest = MANIFEST, teach: Callable[[Tensor], TeacherOutputs] = DISTILLER.teach
) -> CacheWriter:
    prepare(folder, manifest)
    writer = CacheWriter(folder, manifest, images(), teach)
    writer.write(batch_size=3, workers=0, device=torch.device("cpu"), progress=lambda images: None)
    return writer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # as in every test, for the same bits
    folder = tmp_path_factory.mktemp("caches") / "whole"
    make(folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("flipped", [False, True])
def test_cached_outputs_are_those_of_the_teacher(tmp_path: Path, dtype: str, flipped: bool) -> None:
    make(tmp_path / "cache", replace(MANIFEST, dtype=dtype))
    cache = TeacherCache.open(tmp_path / "cache")
    assert (len(cache), cache.num_classes, cache.flips) == (IMAGES, CLASSES, True)
    assert cache.taps == DISTILLER.teacher.taps and cache.channels == DISTILLER.teacher.channels

    order = [10, 0, 4, 3, 7, 8]  # from every part, including its ends
    shown = torch.stack([images()[index][0] for index in order])
    live = DISTILLER.teach(shown.flip(-1) if flipped else shown)
    kept = cache.outputs(torch.stack([cache.row(index, flipped) for index in order]))
    # Half a unit in the last place, or of subnormals; the batches differ, so float32 rounds too.
    rounding = {"rtol": 2**-11 + 1e-5, "atol": 2**-24 + 1e-5} if dtype == "float16" else {"rtol": 1e-5, "atol": 1e-5}
    for found, expected in zip([kept.logits, *kept.pyramids], [live.logits, *live.pyramids], strict=True):
        assert found.dtype == torch.float32 and found.is_contiguous()
        torch.testing.assert_close(found, expected, **rounding)
    other = DISTILLER.teach(shown if flipped else shown.flip(-1))
    assert all((found - wrong).abs().max() > 1e-2 for found, wrong in zip(kept.pyramids, other.pyramids, strict=True))


def test_without_flips_and_without_pyramids(tmp_path: Path) -> None:
    manifest = replace(MANIFEST, identity={"teacher": {}}, taps=(), cells=0)
    make(tmp_path / "cache", manifest, lambda images: DISTILLER.teach(images)._replace(pyramids=None))
    cache = TeacherCache.open(tmp_path / "cache")
    assert not cache.flips and cache.channels == []
    kept = cache.outputs(torch.stack([cache.row(index, False) for index in range(IMAGES)]))
    assert kept.logits.shape == (IMAGES, CLASSES) and kept.pyramids is None
    assert np.load(tmp_path / "cache/part-00002.npy").shape == (3, 1, CLASSES)
    with pytest.raises(CacheError, match="has no flipped images: create it with --hflip, or run with --hflip 0"):
        cache.row(0, flipped=True)
    for index in (-1, IMAGES):
        with pytest.raises(IndexError, match=f"image {index} is out of range: the cache .*cache has 11 images"):
            cache.row(index, flipped=False)


class CountedTeacher:
    """A teacher that counts its images and raises Interrupted before batch number `breaks_at`."""

    def __init__(self, breaks_at: int = 1000) -> None:
        self.seen, self.batches_left = Counter(), breaks_at

    def __call__(self, images: Tensor) -> TeacherOutputs:
        if self.batches_left == 0:
            raise Interrupted
        self.batches_left -= 1
        self.seen.update(image.sum(dim=(0, 1)).numpy().tobytes() for image in images)  # sums differ under a flip
        return DISTILLER.teach(images)


def test_an_interrupted_cache_continues_and_writes_no_part_twice(tmp_path: Path, whole: Path) -> None:
    first, second, folder = CountedTeacher(breaks_at=7), CountedTeacher(), tmp_path / "cache"
    with pytest.raises(Interrupted):  # in the second of two batches of the second part, at its flip
        make(folder, teach=first)
    assert contents(folder).keys() == {"cache.json", "part-00000.npy"}
    with pytest.raises(CacheError, match=r"2 of 3 parts of the cache .* are missing or damaged, first part-00001\.npy"):
        TeacherCache.open(folder)
    (folder / ".tmp-1-part-00001.npy").write_bytes(b"of a killed process")
    made = (folder / "part-00000.npy").stat()

    assert make(folder, teach=second).views == 2 * (IMAGES - 4)
    assert contents(folder) == contents(whole)
    assert (folder / "part-00000.npy").stat() == made
    assert len(second.seen) == 2 * (IMAGES - 4) and set(second.seen.values()) == {1}
    third = CountedTeacher()
    make(folder, teach=third)
    assert not third.seen


def make_and_count(folder: Path) -> tuple[list[int], int]:
    writer = CacheWriter(folder, MANIFEST, images(), DISTILLER.teach)
    parts = writer.parts
    writer.write(batch_size=3, workers=0, device=torch.device("cpu"), progress=lambda images: None)
    return parts, writer.views


@pytest.mark.slow
def test_two_ranks_share_the_parts(tmp_path: Path, whole: Path) -> None:
    prepare(tmp_path / "cache", MANIFEST)
    (tmp_path / "ranks").mkdir()
    of_ranks = in_ranks(2, tmp_path / "ranks", make_and_count, tmp_path / "cache")
    assert of_ranks == [([0, 2], 2 * 7), ([1], 2 * 4)]
    assert contents(tmp_path / "cache") == contents(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": {"teacher": {"model": "vgg11", "weights": "toy"}, "flips": True}}, "teacher model is vgg11 in"),
        ({"identity": {"teacher": {"model": "test_resnet", "weights": "toy"}}}, "identity flips is None in this run"),
        ({"images": 12}, "images is 12 in this run but 11 in the cache"),
        ({"precision": "bfloat16"}, "precision is bfloat16 in this run but float32 in the cache"),
        ({"dtype": "float32"}, "dtype is float32 in this run but float16 in the cache"),
    ],
)
def test_another_cache_is_not_overwritten(copy: Path, changes: dict, message: str) -> None:
    before = contents(copy)
    with pytest.raises(CacheError, match=f"copy contains another cache: .*{message}.*. Choose another folder"):
        prepare(copy, replace(MANIFEST, **changes))
    assert contents(copy) == before


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for place in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(FileExistsError, match="is not empty and not a teacher cache: choose another folder"):
            prepare(place, MANIFEST)
    assert contents(tmp_path) == {"thesis.tex": b"precious"}


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[:-1],
    "longer": lambda raw: raw + b"\0",
    "other header": lambda raw: raw.replace(b"'<f2'", b"'<i2'"),
}


@pytest.mark.parametrize("damage", ["missing", *DAMAGES])
def test_a_damaged_part_raises_and_is_written_again(copy: Path, whole: Path, damage: str) -> None:
    part = copy / "part-00001.npy"
    part.unlink() if damage == "missing" else part.write_bytes(DAMAGES[damage](part.read_bytes()))
    with pytest.raises(
        CacheError, match=r"1 of 3 parts .* missing or damaged, first part-00001\.npy: run `lfcc cache` again"
    ):
        TeacherCache.open(copy)
    assert make(copy).views == 2 * 4
    assert contents(copy) == contents(whole)


@pytest.mark.parametrize("damage", ["empty", "cut", "list", "lacking", "unknown", "binary"])
def test_a_damaged_manifest_raises(copy: Path, damage: str) -> None:
    path, text = copy / "cache.json", (copy / "cache.json").read_text()
    damages = {
        "empty": "",
        "cut": text[: len(text) // 2],
        "list": "[]",
        "lacking": text.replace('"images": 11,', ""),
        "unknown": text.replace("{", '{"colour": "red",', 1),
        "binary": "\udcff",
    }
    path.write_text(damages[damage], errors="surrogateescape")
    with pytest.raises(CacheError, match=r"cache\.json is damaged .*: delete .*copy and create the cache again"):
        TeacherCache.open(copy)


def test_no_cache_and_a_cache_of_another_format(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no teacher cache in nowhere: create it with `lfcc cache nowhere"):
        TeacherCache.open("nowhere")
    path = copy / "cache.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CacheError, match="has format 2, expected 1: create it again"):
        TeacherCache.open(copy)


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "cache is full; finished parts are complete"), (errno.EIO, "^.Errno 5. Input/output")],
)
def test_disk_errors_keep_the_finished_parts(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    folder, synced = tmp_path / "cache", []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 4:  # after the manifest and two parts
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match=message) as caught:
        make(folder)
    assert caught.value.errno == code
    assert contents(folder).keys() == {"cache.json", "part-00000.npy", "part-00001.npy"}
    make(folder)
    assert contents(folder) == contents(whole)


def test_a_disk_that_is_too_small_raises_before_anything_is_written(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 2 * IMAGES * (CLASSES + 5 * sum(DISTILLER.teacher.channels)) * 2
    free = [rows - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free[0]))
    with pytest.raises(OSError, match=r"needs .* kB but its disk has .* kB free: use another disk"):
        prepare(tmp_path / "new/cache", MANIFEST)
    assert list(tmp_path.iterdir()) == []
    free[0] = 0
    assert prepare(whole, MANIFEST) == []  # nothing is missing there
    free[0] = rows
    assert prepare(tmp_path / "new/cache", MANIFEST) == [0, 1, 2]


def test_values_that_overflow_float16(tmp_path: Path) -> None:
    def teach(images: Tensor, factor: float) -> TeacherOutputs:
        outputs = DISTILLER.teach(images)
        return outputs._replace(pyramids=[pyramid * factor for pyramid in outputs.pyramids])

    with pytest.raises(CacheError, match=r"reach \S+e\+\d+, which overflows float16: use --cache-dtype float32"):
        make(tmp_path / "half", teach=lambda images: teach(images, 1e7))
    with pytest.raises(CacheError, match="outputs are not finite in float32: check its weights, or"):
        make(tmp_path / "nan", teach=lambda images: teach(images, float("nan")))
    assert contents(tmp_path / "half").keys() == contents(tmp_path / "nan").keys() == {"cache.json"}
    make(tmp_path / "single", replace(MANIFEST, dtype="float32"), lambda images: teach(images, 1e7))
    assert TeacherCache.open(tmp_path / "single").row(0, False).max() > 65504


def read(cache: TeacherCache, indices: Sequence[int] = range(IMAGES)) -> Tensor:
    return torch.stack([cache.row(index, flipped=True) for index in indices])


def test_other_processes_can_read_a_cache(whole: Path) -> None:
    cache = TeacherCache.open(whole)
    expected = read(cache)  # opens all parts
    pickled = pickle.dumps(cache)
    assert len(pickled) < 5000
    assert torch.equal(read(pickle.loads(pickled)), expected)
    loader = DataLoader(range(IMAGES), IMAGES, num_workers=1, collate_fn=partial(read, cache))
    assert torch.equal(next(iter(loader)), expected)


def test_few_files_are_open_at_once(tmp_path: Path) -> None:
    """Each open part needs a file descriptor, and a process may have at most 1,024."""
    folder, manifest = tmp_path / "cache", replace(MANIFEST, taps=(), images=200, images_per_part=1)
    prepare(folder, manifest)
    for part in range(200):
        row = np.full((1, 2, CLASSES), part, np.float16)
        np.save(manifest.path(folder, part), row)
    cache = TeacherCache.open(folder)  # files of np.save are valid parts
    assert [int(cache.row(index, True)[0]) for index in range(200)] == list(range(200))
    opened = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert 0 < sum(path.startswith(str(folder)) for path in opened) <= 128
