"""Loads the compiled libraries: `_C` with the kernels, and `_host` with facts about the build and this machine."""

import importlib
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = Path(__file__).resolve().parent.parent


def _load_kernels() -> str:
    """Load `_C`; returns why this failed, or an empty string."""
    libraries = sorted(PACKAGE.glob("_C*.so"))
    if not libraries:
        return (
            "the compiled library lfcc_kernels/_C is missing; install a C++ compiler (g++ 12 or newer) and rebuild "
            "with `pip install --no-build-isolation .`"
        )
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"the compiled library {libraries[0].name} cannot be loaded ({error}); rebuild it with this torch"
    return ""


def _load_host() -> ModuleType | None:
    """The module `_host`, or None: unlike `_C`, it is built for one version of Python."""
    try:
        return importlib.import_module("lfcc_kernels._host")
    except ImportError:
        return None


missing = _load_kernels()
host = _load_host()
