"""`lfcc bench --tune`: measures tiles and crossovers on this GPU and writes them as its table.

It needs no part of Triton to say that it cannot run. A table is written whole at the end, or not at all.
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
from lfcc_kernels.files import replace_file
from lfcc_kernels.version import __version__, commit

Tune = Callable[[], tuple[dict[str, Any], list[str]]]


def tune(output: str | Path | None = None) -> None:
    """Write the table of the current GPU to `output`, else to where the kernels look for it.

    Raises:
        ValueError: no GPU that the Triton backend serves, or no place to write to.
    """
    if INTERPRET:
        raise ValueError("bench --tune measures a GPU, and TRITON_INTERPRET=1 is in the environment; unset it")
    if reason := missing():
        raise ValueError(f"bench --tune needs an NVIDIA GPU and Triton: {reason.partition(';')[0]}")
    from lfcc_kernels.backends.triton import runtime, tiles
    from lfcc_kernels.bench.tune.cases import Sizes
    from lfcc_kernels.bench.tune.launches import DeviceClock
    from lfcc_kernels.bench.tune.search import Tuner

    device = torch.device("cuda", torch.cuda.current_device())
    architecture = runtime.device_props(device).capability
    path = Path(output) if output else tiles.table_path(architecture)
    say(f"{torch.cuda.get_device_name()}: a few minutes, then {path}")
    tuner = Tuner(tiles.table(architecture), Sizes(), DeviceClock(device), say)
    write_table(path, architecture, tuner.tune, _source())


def write_table(path: Path, architecture: int, tune: Tune, source: str) -> None:
    """Put what `tune` finds into the file at `path`, which is left alone where it finds nothing or is interrupted."""
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"bench --tune: {path.parent} is no folder that can be written to; name a file with -o FILE")
    try:
        table, kept = tune()
        names = {f"{kernel} {line}" for kernel, lines in table["kernels"].items() for line in lines}
        if names <= set(kept):
            raise ValueError(f"bench --tune: no kernel could be measured, {path} is as it was")
        source += f"; not measured: {', '.join(kept)}" if kept else ""
        table |= {"architecture": architecture, "source": source}
        with replace_file(path) as file:
            file.write(f"{json.dumps(table, indent=1)}\n".encode())
    except KeyboardInterrupt:
        say(f"interrupted, {path} is as it was")
        raise
    say(f"wrote {path}" + (f"; as they were: {', '.join(kept)}" if kept else ""))


def say(line: str) -> None:
    """Progress, beside the output."""
    print(line, file=sys.stderr, flush=True)


def _source() -> str:
    """Where the numbers of a table come from."""
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}, lfcc_kernels {__version__}"
    today = datetime.now(timezone.utc).date().isoformat()
    return f"measured on {torch.cuda.get_device_name()}, {today}, {versions} {commit()}".rstrip()
