"""Atomic writes, and checkpoints: round trip and errors."""

import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from toy_runs import make_distiller

from lfcc_kernels.distill import CheckpointError, FitSettings, load_checkpoint
from lfcc_kernels.distill.checkpoint import restore_rng, rng_state, save_checkpoint
from lfcc_kernels.distill.loop import create_training_state
from lfcc_kernels.files import remove_stale, replace_file


def state(**settings) -> dict:
    return create_training_state(make_distiller(), 4, FitSettings(**settings)).state_dict() | {"config": {}}


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"), replace_file(path) as file:
        file.write(b"half of the n")
        raise OSError("disk full")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with replace_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    keep = tmp_path / "last.pt"
    keep.touch()
    writing = replace_file(tmp_path / "best.pt")
    writing.__enter__().write(b"half")
    assert len(list(tmp_path.iterdir())) == 2
    remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == [keep]


def test_round_trip_and_loading_by_timm(tmp_path: Path) -> None:
    saved = state(model_ema=True)
    save_checkpoint(tmp_path / "last.pt", saved)
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert loaded.keys() == saved.keys() and loaded["progress"] == saved["progress"]
    model = timm.create_model(
        "test_vit", num_classes=3, img_size=32, patch_size=8, checkpoint_path=str(tmp_path / "last.pt")
    )
    assert all(torch.equal(value, saved["state_dict_ema"][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "code", "other"])
def test_a_damaged_checkpoint_raises(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, state())
    whole = path.read_bytes()
    if damage == "code":
        torch.save({"state_dict": print}, path)
    elif damage == "other":
        torch.save({"state_dict": {}}, path)
    else:
        middle = len(whole) // 2
        path.write_bytes(
            {
                "empty": b"",
                "cut": whole[:middle],
                "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
                "text": b"not a checkpoint",
            }[damage]
        )
    what = "is not a checkpoint of a training run" if damage == "other" else "is damaged or not a PyTorch checkpoint"
    with pytest.raises(CheckpointError, match=f"last.pt {what}"):
        load_checkpoint(path)


def test_a_checkpoint_that_does_not_match_raises() -> None:
    here = create_training_state(make_distiller(), 4, FitSettings())
    with pytest.raises(CheckpointError, match="has state_dict_ema state but this run does not use a moving"):
        here.load_state_dict(state(model_ema=True))
    with pytest.raises(CheckpointError, match="the checkpoint has loss state but this run does not use the LFCC loss"):
        create_training_state(make_distiller(beta=0), 4, FitSettings()).load_state_dict(state())
    wider = state()
    wider["state_dict"]["head.weight"] = torch.zeros(9, 64)
    with pytest.raises(CheckpointError, match=r"model state of the checkpoint does not match this run: .*head\.weight"):
        here.load_state_dict(wider)


def test_random_numbers_continue(tmp_path: Path) -> None:
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    random.gauss(0, 1), np.random.randn(), torch.randn(5)
    save_checkpoint(tmp_path / "rng.pt", rng_state())
    expected = random.gauss(0, 1), np.random.randn(), torch.randn(()).item()
    restore_rng(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (random.gauss(0, 1), np.random.randn(), torch.randn(()).item()) == expected
