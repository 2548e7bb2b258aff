"""Distillation of vision models: the training loop and its parts. Needs the extra `lfcc-kernels[train]`."""

from .checkpoint import CheckpointError, load_checkpoint
from .config import FitSettings
from .data.loader import Batch, Batches
from .distiller import CachedGradients, Distiller, StudentOutputs, TeacherOutputs, build_lfcc
from .features import FeatureExtractor, Tap, available_taps, create_extractor, default_taps
from .loop import Terminated, fit
from .models import TeacherInput
from .run_folder import RunFolder, read_csv
from .teacher_cache import CacheError, TeacherCache

__all__ = [
    "Batch",
    "Batches",
    "CacheError",
    "CachedGradients",
    "CheckpointError",
    "Distiller",
    "FeatureExtractor",
    "FitSettings",
    "RunFolder",
    "StudentOutputs",
    "Tap",
    "TeacherCache",
    "TeacherInput",
    "TeacherOutputs",
    "Terminated",
    "available_taps",
    "build_lfcc",
    "create_extractor",
    "default_taps",
    "fit",
    "load_checkpoint",
    "read_csv",
]
