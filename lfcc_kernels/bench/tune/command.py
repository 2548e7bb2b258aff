"""The command `lfcc bench --tune`: tunes tiles and crossovers of the Triton kernels on this GPU and writes its table.

Imports Triton only after checking that it can run. The table is written once, at the end.
"""

import json
import os
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lfcc_kernels.backends.triton import INTERPRET, missing
from lfcc_kernels.files import write_file
from lfcc_kernels.version import __version__, commit

Tune = Callable[[], tuple[dict[str, Any], list[str]]]


def tune(output: str | Path | None = None) -> None:
    """Tune on the current GPU and write the table to `output`, by default to the file that the kernels read.

    Raises:
        ValueError: The Triton backend is not available on a GPU, no kernel could be measured, or the folder of the
            table is not writable.
    """
    if INTERPRET:
        raise ValueError("bench --tune: TRITON_INTERPRET=1 is set, but tuning needs a GPU; unset it")
    if reason := missing():
        raise ValueError(f"bench --tune: needs an NVIDIA GPU and Triton, but {reason.partition(';')[0]}")
    from lfcc_kernels.backends.triton import runtime, tiles
    from lfcc_kernels.bench.tune.cases import Sizes
    from lfcc_kernels.bench.tune.launches import DeviceClock
    from lfcc_kernels.bench.tune.search import Tuner

    device = torch.device("cuda", torch.cuda.current_device())
    architecture = runtime.device_props(device).capability
    path = Path(output) if output else tiles.table_path(architecture)
    say(f"tuning on {torch.cuda.get_device_name()}, a few minutes; output: {path}")
    tuner = Tuner(tiles.table(architecture), Sizes(), DeviceClock(device), say)
    write_table(path, architecture, tuner.tune, _source())


def write_table(path: Path, architecture: int, tune: Tune, source: str) -> None:
    """Write the result of `tune` to `path`. The file is unchanged if nothing was measured or on an interruption."""
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"bench --tune: {path.parent} is not a writable folder; name a file with -o FILE")
    try:
        table, kept = tune()
        names = {f"{kernel} {line}" for kernel, lines in table["kernels"].items() for line in lines}
        if names <= set(kept):
            raise ValueError(f"bench --tune: no kernel could be measured; {path} is unchanged")
        source += f"; not measured: {', '.join(kept)}" if kept else ""
        table |= {"architecture": architecture, "source": source}
        write_file(path, f"{json.dumps(table, indent=1)}\n")
    except KeyboardInterrupt:
        say(f"interrupted; {path} is unchanged")
        raise
    say(f"wrote {path}" + (f"; not measured, unchanged: {', '.join(kept)}" if kept else ""))


def say(line: str) -> None:
    """Print progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def _source() -> str:
    """Device, date and versions, for the table."""
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}, lfcc_kernels {__version__}"
    today = datetime.now(timezone.utc).date().isoformat()
    return f"measured on {torch.cuda.get_device_name()}, {today}, {versions} {commit()}".rstrip()
