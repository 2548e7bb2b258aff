"""Resumed runs equal uninterrupted ones."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from toy_runs import Interrupted, InterruptedBatches, ToyBatches, run

from lfcc_kernels.distill import load_checkpoint, read_csv
from lfcc_kernels.distill.data.loader import TrainBatches


def augmented_images() -> TrainBatches:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 40, 40, 3), dtype=np.uint8)
    transform = create_transform(32, is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.5)
    return TrainBatches(
        [(Image.fromarray(image), i % 3) for i, image in enumerate(pixels)], transform, batch_size=5, seed=0
    )


def flat(state: object, name: str = "") -> dict[str, object]:
    """Every leaf of a checkpoint by its path."""
    if isinstance(state, dict):
        return {key: leaf for inner, value in state.items() for key, leaf in flat(value, f"{name}/{inner}").items()}
    if isinstance(state, list | tuple):
        return flat(dict(enumerate(state)), name)
    return {name: state}


@pytest.mark.parametrize("batches", [ToyBatches, augmented_images])
@pytest.mark.parametrize("stop", [5, 10])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(tmp_path: Path, batches, stop: int) -> None:
    # 3 epochs of 4 updates. After 5 updates the last checkpoint is that of an epoch, 4; after 10 it is 9.
    run(tmp_path / "straight", batches())
    with pytest.raises(Interrupted):
        run(tmp_path / "broken", InterruptedBatches(batches(), stop))
    middle = load_checkpoint(tmp_path / "broken/checkpoints/last.pt")
    assert middle["progress"]["step"] == {5: 4, 10: 9}[stop]
    torch.manual_seed(99)
    run(tmp_path / "broken", batches(), checkpoint=middle)

    straight, resumed = (
        flat(load_checkpoint(tmp_path / name / "checkpoints/last.pt")) for name in ("straight", "broken")
    )
    assert straight.keys() == resumed.keys()
    assert {"state_dict", "state_dict_ema", "loss", "optimizer", "scheduler", "rng"} <= {
        name.split("/")[1] for name in straight
    }
    clocks = {name for name in straight if "second" in name or name.endswith("_share")}
    for name in straight.keys() - clocks:
        same = torch.equal if isinstance(straight[name], torch.Tensor) else lambda a, b: a == b
        assert same(straight[name], resumed[name]), name
    for name in ("steps.csv", "summary.csv"):
        rows = [read_csv(tmp_path / folder / name) for folder in ("straight", "broken")]
        assert [(row["step"], row["loss"]) for row in rows[0]] == [(row["step"], row["loss"]) for row in rows[1]]


def test_resume_with_other_batches_raises(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, InterruptedBatches(ToyBatches(), 3))
    checkpoint = load_checkpoint(tmp_path / "checkpoints/last.pt")
    with pytest.raises(ValueError, match="at update 3 of an epoch but this run has 2 updates per epoch"):
        run(tmp_path, ToyBatches(batches=2), checkpoint=checkpoint)
    with pytest.raises(ValueError, match="training set is smaller than one update"):
        run(tmp_path / "none", ToyBatches(batches=0))


KILLED_RUN = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
from toy_runs import ToyBatches, run
run(Path({folder!r}), ToyBatches(batches=1000), checkpoint_interval=1, log_interval=1)
"""


@pytest.mark.slow
def test_a_killed_run_has_a_valid_checkpoint_at_any_time(tmp_path: Path) -> None:
    last = tmp_path / "checkpoints/last.pt"
    script = KILLED_RUN.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 60
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(20):  # it saves after each update
            load_checkpoint(last)
            time.sleep(random.random() / 20)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    checkpoint = load_checkpoint(last)
    step = checkpoint["progress"]["step"]
    (last.parent / ".tmp-1-last.pt").write_bytes(b"half of a")
    with pytest.raises(Interrupted):
        run(
            tmp_path,
            InterruptedBatches(ToyBatches(batches=1000), 2),
            checkpoint=checkpoint,
            checkpoint_interval=1,
            log_interval=1,
        )
    assert {path.name for path in last.parent.iterdir()} == {"last.pt"}
    assert [row["step"] for row in read_csv(tmp_path / "steps.csv")] == list(range(1, step + 3))
