"""A thin loop that distills one vision model into another: needs the extra `lfcc-kernels[train]`."""

from .checkpoint import CheckpointError, load_checkpoint
from .distiller import Distiller, TeacherOutputs, build_lfcc
from .features import FeatureExtractor, Tap, available_taps, create_extractor, default_taps
from .loop import Batch, Batches, FitSettings, fit
from .run_folder import RunFolder, read_csv

__all__ = [
    "Batch",
    "Batches",
    "CheckpointError",
    "Distiller",
    "FeatureExtractor",
    "FitSettings",
    "RunFolder",
    "Tap",
    "TeacherOutputs",
    "available_taps",
    "build_lfcc",
    "create_extractor",
    "default_taps",
    "fit",
    "load_checkpoint",
    "read_csv",
]
