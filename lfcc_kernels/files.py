"""Atomic writes: after a crash a file is the old or the new one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = ".tmp-"


@contextmanager
def replace_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` when the block ends without an exception."""
    path = Path(path)
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: str | Path, data: str | bytes) -> None:
    """Write a file with `replace_file`."""
    with replace_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def remove_stale(folder: str | Path) -> None:
    """Delete the unfinished files of a killed process in `folder`."""
    for temporary in Path(folder).glob(f"{_TEMPORARY}*"):
        temporary.unlink()
