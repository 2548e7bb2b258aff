"""How `fit` trains."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FitSettings:
    """How to train. `amp` None means mixed precision on a GPU and float32 on a CPU."""

    epochs: int = 100
    accum_steps: int = 1
    opt: str = "adamw"
    momentum: float = 0.9
    lr: float = 5e-4
    weight_decay: float = 0.05
    sched: str = "cosine"
    min_lr: float = 1e-6
    decay_epochs: float = 30
    decay_rate: float = 0.1
    warmup_epochs: float = 5
    warmup_lr: float | None = None
    clip_grad: float | None = None
    amp: bool | None = None
    amp_dtype: str = "bfloat16"
    channels_last: bool = False
    torchcompile: bool = False
    fsdp: bool = False
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    log_interval: int = 50
    checkpoint_interval: int | None = None
    checkpoint_hist: int = 1

    def precision(self, device: torch.device) -> torch.dtype:
        """The dtype of the matrix products and convolutions on `device`."""
        amp = device.type == "cuda" if self.amp is None else self.amp
        return getattr(torch, self.amp_dtype) if amp else torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """A context in which these run in that dtype."""
        dtype = self.precision(device)
        return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
