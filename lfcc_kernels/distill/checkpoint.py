"""Checkpoints: the complete state of a run, written atomically; a resumed run equals an uninterrupted one.

A checkpoint is a dict of tensors and plain values, loaded with `weights_only=True`:
- `state_dict` (the bare student) and `state_dict_ema`, named as in timm, so that `timm.create_model(...,
  checkpoint_path=)` loads the file;
- `loss`: the projections and filters;
- `optimizer` (by parameter name), `scheduler`, `scaler`, `progress`, `rng` (one per rank), `config`.

A sharded run saves whole tensors.
"""

import dataclasses
import random
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed.checkpoint.state_dict as dcp
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from lfcc_kernels.files import replace_file

from .distiller import Distiller
from .distributed import gather_objects, rank, world_size
from .metrics import seconds


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not match the run."""


@dataclass
class Progress:
    """Progress of a run: finished epochs, finished updates of the current epoch and their sums, all updates (`step`).

    `best` are the highest accuracies so far in descending order, one per checkpoint of a best epoch.
    """

    epoch: int = 0
    updates: int = 0
    step: int = 0
    best: list[float] = field(default_factory=list)
    seconds: float = 0.0
    epoch_totals: dict[str, float] = field(default_factory=dict)
    summary: dict[str, float] = field(default_factory=dict)

    def add(self, totals: Mapping[str, float]) -> None:
        """Add the sums of the updates since the last call."""
        self.seconds += seconds(totals)
        self.epoch_totals = {name: self.epoch_totals.get(name, 0.0) + total for name, total in totals.items()}


@dataclass
class TrainingState:
    """Everything that an update changes. `module` is the module to train: the distiller, or its DDP wrapper."""

    distiller: Distiller
    module: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    progress: Progress = field(default_factory=Progress)

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        """Plain values and whole tensors. Call it on all ranks; only rank 0 gets the complete state."""
        weights = dcp.get_model_state_dict(self.distiller, options=_WHOLE)
        state = {
            "state_dict": _under(_STUDENT, weights),
            "optimizer": dcp.get_optimizer_state_dict(self.distiller, self.optimizer, options=_WHOLE),
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "rng": gather_objects(rng_state()),
        }
        if self.distiller.lfcc is not None:
            state["loss"] = _under(_LOSS, weights)
        if self.ema is not None:
            state["state_dict_ema"] = dcp.get_model_state_dict(self.ema.module, options=_WHOLE)
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`. Raises CheckpointError if it does not match model, loss, settings or number of ranks."""
        parts = {
            "loss": (self.distiller.lfcc, "the LFCC loss (--lfcc-beta)"),
            "state_dict_ema": (self.ema, "a moving average (--model-ema)"),
            "scheduler": (self.scheduler, "a learning rate schedule (--sched)"),
        }
        for name, (part, option) in parts.items():
            if (part is None) == (name in state):
                has, uses = ("has", "does not use") if part is None else ("has no", "uses")
                raise CheckpointError(
                    f"the checkpoint {has} {name} state but this run {uses} {option}: resume with the options of the "
                    "checkpoint"
                )
        if len(state["rng"]) != world_size():
            raise CheckpointError(
                f"the checkpoint is from {len(state['rng'])} processes but this run has {world_size()}, which changes "
                f"the batches: resume with {len(state['rng'])} processes, or start a new run"
            )
        weights = {
            **{_STUDENT + name: value for name, value in state["state_dict"].items()},
            **{_LOSS + name: value for name, value in state.get("loss", {}).items()},
        }
        loads = {
            "model": lambda: dcp.set_model_state_dict(self.distiller, weights, options=_WHOLE),
            "optimizer": lambda: dcp.set_optimizer_state_dict(
                self.distiller, self.optimizer, state["optimizer"], options=_WHOLE
            ),
            "scaler": lambda: self.scaler.load_state_dict(state["scaler"]),
        }
        if self.ema is not None:
            average = state["state_dict_ema"]
            loads["average"] = lambda: dcp.set_model_state_dict(self.ema.module, average, options=_WHOLE)
        if self.scheduler is not None:
            loads["scheduler"] = lambda: self.scheduler.load_state_dict(state["scheduler"])
        for name, load in loads.items():
            try:
                load()
            except (AttributeError, KeyError, RuntimeError, ValueError) as error:
                raise CheckpointError(
                    f"the {name} state of the checkpoint does not match this run: {' '.join(str(error).split())[:300]}"
                ) from error
        self.progress = Progress(**state["progress"])
        restore_rng(state["rng"][rank()])


_STUDENT, _LOSS = "student.model.", "lfcc."
_WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # not FSDP shards


def _under(prefix: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path` atomically: after a crash the file is the old or the new one. Raises OSError."""
    try:
        with replace_file(path) as file:
            torch.save(dict(state), file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        raise OSError(
            f"cannot write {path} ({str(error).splitlines()[0]}); the previous checkpoint is intact: free space, then "
            "--resume"
        ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint into CPU memory. Raises FileNotFoundError or CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save writes checksums, but torch.load does not verify them.
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the type depends on the damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or not a PyTorch checkpoint ({reason})") from error
    missing = {"state_dict", "optimizer", "scaler", "progress", "rng", "config"} - state.keys()
    if missing:
        raise CheckpointError(f"{path} is not a checkpoint of a training run: {', '.join(sorted(missing))} missing")
    return state


def rng_state() -> dict[str, Any]:
    """State of the global generators of Python, NumPy, torch and all GPUs as plain values and tensors."""
    name, keys, position, has_gauss, gauss = cast(tuple, np.random.get_state())  # a dict for other generators only
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
