"""Checkpoints: everything a run needs to go on as if it had never stopped, written atomically.

A checkpoint is a dict of tensors and plain values, read with `weights_only=True`: `state_dict` (the bare
student) and `state_dict_ema` are named as in timm, so `timm.create_model(..., checkpoint_path=)` reads the
file as it is; `loss` holds projections and filters; then `optimizer`, `scheduler`, `scaler`, `progress`,
`rng` and `config`.
"""

import dataclasses
import random
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3

from lfcc_kernels.files import replace_file

from .distiller import Distiller
from .metrics import seconds


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the run."""


@dataclass
class Progress:
    """How far a run is: epochs done, batches done of the next one with their sums, updates in all."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_top1: float = -1.0
    seconds: float = 0.0
    epoch_totals: dict[str, float] = field(default_factory=dict)
    summary: dict[str, float] = field(default_factory=dict)

    def add(self, totals: Mapping[str, float]) -> None:
        """Take in the sums of the updates since the last call."""
        self.seconds += seconds(totals)
        self.epoch_totals = {name: self.epoch_totals.get(name, 0.0) + total for name, total in totals.items()}


@dataclass
class TrainingState:
    """What changes from update to update. `scheduler` and `ema` may be None."""

    distiller: Distiller
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    progress: Progress = field(default_factory=Progress)

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _parts(self) -> dict[str, Any]:
        parts = {
            "state_dict": self.distiller.student.model,
            "state_dict_ema": self.ema and self.ema.module,
            "loss": self.distiller.lfcc,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        return state | {"progress": dataclasses.asdict(self.progress), "rng": rng_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to `state`. Raises CheckpointError where it does not fit model, loss or settings."""
        parts = self._parts()
        optional = {"state_dict_ema", "loss", "scheduler"}
        if extra := (optional & state.keys()) ^ (optional & parts.keys()):
            raise CheckpointError(
                f"the checkpoint and this run differ in having {', '.join(sorted(extra))}: "
                "resume with the settings that the run was started with"
            )
        for name, part in parts.items():
            try:
                part.load_state_dict(state[name])
            except (KeyError, RuntimeError, ValueError) as error:
                raise CheckpointError(
                    f"{name} of the checkpoint does not fit this run: {' '.join(str(error).split())[:300]}"
                ) from error
        self.progress = Progress(**state["progress"])
        restore_rng(state["rng"])


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path` at once: a crash leaves the old file or the new one."""
    with replace_file(path) as file:
        torch.save(dict(state), file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint into CPU memory. Raises FileNotFoundError or CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save writes checksums, torch.load does not look at them.
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or no checkpoint of PyTorch ({reason})") from error
    missing = {"state_dict", "optimizer", "scaler", "progress", "rng", "config"} - state.keys()
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of a training run: it has no {', '.join(sorted(missing))}")
    return state


def rng_state() -> dict[str, Any]:
    """State of the global generators of Python, NumPy, torch and every GPU, in plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
