"""Checkpoints: everything a run needs to go on as if it had never stopped, written atomically.

A checkpoint is a dict of tensors and plain values, read with `weights_only=True`: `state_dict` (the bare
student) and `state_dict_ema` are named as in timm, so `timm.create_model(..., checkpoint_path=)` reads the
file as it is; `loss` holds projections and filters; then `optimizer`, by the names of its parameters, `scheduler`,
`scaler`, `progress`, `rng`, one a rank, and `config`. A sharded run saves whole tensors.
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
import torch.distributed.checkpoint.state_dict as dcp
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from lfcc_kernels.files import replace_file

from .distiller import Distiller
from .metrics import seconds
from .ranks import gather_objects, rank, world_size


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the run."""


@dataclass
class Progress:
    """How far a run is: epochs done, updates done of the next one with their sums, updates in all.

    `best` are the best accuracies so far, as many as checkpoints of them are kept, best first.
    """

    epoch: int = 0
    updates: int = 0
    step: int = 0
    best: list[float] = field(default_factory=list)
    seconds: float = 0.0
    epoch_totals: dict[str, float] = field(default_factory=dict)
    summary: dict[str, float] = field(default_factory=dict)

    def add(self, totals: Mapping[str, float]) -> None:
        """Take in the sums of the updates since the last call."""
        self.seconds += seconds(totals)
        self.epoch_totals = {name: self.epoch_totals.get(name, 0.0) + total for name, total in totals.items()}


@dataclass
class TrainingState:
    """What changes from update to update. `module` is what trains: the distiller, or what parallelizes it."""

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
        """Plain values and whole tensors, to be called on all ranks; complete on the main one."""
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
        """Go back to `state`. Raises CheckpointError where it does not fit model, loss, settings or ranks."""
        parts = {"loss": self.distiller.lfcc, "state_dict_ema": self.ema, "scheduler": self.scheduler}
        if differ := [name for name, part in parts.items() if (part is None) == (name in state)]:
            raise CheckpointError(
                f"the checkpoint and this run differ in having {', '.join(differ)}: "
                "resume with the settings that the run was started with"
            )
        if len(state["rng"]) != world_size():
            raise CheckpointError(
                f"the run was started on {len(state['rng'])} processes and is resumed on {world_size()}: its batches "
                "would no longer be the same; resume on as many, or start a new run"
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
                    f"{name} of the checkpoint does not fit this run: {' '.join(str(error).split())[:300]}"
                ) from error
        self.progress = Progress(**state["progress"])
        restore_rng(state["rng"][rank()])


_STUDENT, _LOSS = "student.model.", "lfcc."
_WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # not the shards of FSDP


def _under(prefix: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path` at once: a crash leaves the old file or the new one. Raises OSError."""
    try:
        with replace_file(path) as file:
            torch.save(dict(state), file)
    except (OSError, RuntimeError) as error:  # torch has no other words for a disk that takes no more
        raise OSError(
            f"{path} could not be written ({str(error).splitlines()[0]}); what is in its folder is whole: make room "
            "and go on with --resume"
        ) from error


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
