"""The version of the package, the commit of the checkout it runs from, and the versions of other packages."""

import importlib.metadata
import subprocess
from pathlib import Path

__version__ = "0.1.0"


def commit() -> str:
    """The git commit of the checkout, with "-dirty" if files differ from it; empty for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def package_version(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
