"""`lfcc distill` in separate processes: torchrun, SIGTERM, lost ranks and full disks."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lfcc_kernels.cli import main
from lfcc_kernels.distill import load_checkpoint, read_csv

pytestmark = pytest.mark.slow

TEACHER = "--student test_resnet --kd-alpha 0 --lfcc-beta 0 --epochs 1 --experiment teacher -b 128"
RUN = (
    "--student test_vit --student-kwargs patch_size=8 --student-taps 0 2 5 --teacher test_resnet --teacher-taps 1 2 3 "
    "--lfcc-scales 1 2 --lr 2e-3 --warmup-epochs 0 --log-interval 1 --checkpoint-interval 1"
)


def words(folder: Path, options: str) -> list[str]:
    common = f"distill --dataset digits --img-size 32 --workers 0 --no-aug --output {folder}"
    return [*common.split(), *options.split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a teacher."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(words(folder, TEACHER)) == 0
    return folder


def run(folder: Path, options: str) -> list[str]:
    return words(folder, f"{RUN} --teacher-checkpoint {folder}/teacher/checkpoints/best.pt {options}")


def start(command: list[str], ranks: int = 1, **options) -> list[subprocess.Popen]:
    """One process per rank, with the environment variables of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        variables = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        python = [sys.executable, "-W", "ignore", "-m", "lfcc_kernels.cli"]
        processes.append(
            subprocess.Popen(
                [*python, *command], env=os.environ | variables, stderr=subprocess.PIPE, text=True, **options
            )
        )
    return processes


def wait_for(condition: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline and all(process.poll() is None for process in processes):
        time.sleep(0.05)


def test_two_processes_of_torchrun_equal_one(folder: Path) -> None:
    assert main(run(folder, "--epochs 1 -b 64 --accum-steps 2 --experiment one")) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lfcc_kernels.cli"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, *run(folder, "--epochs 1 -b 32 --accum-steps 2 --experiment two")], env=env, check=True)
    one, two = (read_csv(folder / name / "steps.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 10
    for name in ("loss", "ce", "kd", "lfcc", "grad_norm"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-3)
    assert [row["loss"] for row in two[:3]] == pytest.approx([row["loss"] for row in one[:3]], rel=1e-5)
    one, two = (read_csv(folder / name / "summary.csv")[-1] for name in ("one", "two"))
    assert two["top1"] == pytest.approx(one["top1"], abs=1) and two["best_top1"] == two["top1"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_a_checkpoint(folder: Path, ranks: int) -> None:
    last = folder / f"ended-{ranks}/checkpoints/last.pt"
    options = f"--epochs 9 -b 32 --workers {2 - ranks} --experiment ended-{ranks}"
    processes = start(run(folder, options), ranks, start_new_session=True)
    wait_for(last.exists, processes)
    if ranks == 1:
        os.killpg(processes[0].pid, signal.SIGTERM)  # the loader process gets the signal too
    else:
        processes[1].send_signal(signal.SIGTERM)  # only one rank gets the signal
    messages = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [143] * ranks, messages
    step = load_checkpoint(last)["progress"]["step"]
    assert messages[0] == f"terminated after update {step}, saved {last}: continue with --resume\n"
    assert not any(messages[1:])
    assert read_csv(last.parents[1] / "steps.csv")[-1]["step"] == step


def test_a_lost_rank_ends_the_others_with_one_line(folder: Path) -> None:
    last = folder / "lost/checkpoints/last.pt"
    processes = start(run(folder, "--epochs 9 -b 32 --experiment lost"), 2)
    wait_for(last.exists, processes)
    processes[1].kill()
    message = processes[0].communicate(timeout=120)[1]
    assert processes[0].returncode == 1 and message.count("\n") == 1
    assert message.startswith("lfcc: error: rank 0: a peer process died or timed out")
    processes[1].communicate()
    assert load_checkpoint(last)["progress"]["step"] > 0


def test_a_full_disk_ends_a_run_with_one_line(folder: Path) -> None:
    last = folder / "full/checkpoints/last.pt"

    def limit() -> None:  # simulates a full disk by a limit on file sizes
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    (process,) = start(run(folder, "--epochs 9 -b 32 --experiment full"), preexec_fn=limit)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and message.count("\n") == 1
    assert message.startswith(f"lfcc: error: cannot write {last} (")
    assert "the previous checkpoint is intact: free space, then --resume" in message
    assert list(last.parent.iterdir()) == []


def test_a_full_disk_keeps_the_previous_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfcc_kernels.distill.checkpoint import save_checkpoint

    path = tmp_path / "last.pt"
    save_checkpoint(path, {"x": torch.zeros(1000)})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match=r"cannot write .*last\.pt .*; the previous checkpoint is intact"):
            save_checkpoint(path, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
