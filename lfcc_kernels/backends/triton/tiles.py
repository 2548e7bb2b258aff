"""Block sizes, warps and pipeline stages per architecture, kernel and shape class, from the committed `tables/`.

A table is {"architecture": 90, "source": origin of its numbers, "kernels": {KERNEL: {CLASS: {NAME: number}}}}.
`lfcc bench --tune` writes the table of the GPU it runs on; nothing is tuned during training.
"""

import functools
import json
from pathlib import Path

import triton

# An FMA of a product with the subtraction of a log-sum-exp would round differently where equal logits must cancel.
_UNFUSED = ("chunk_one_pass", "chunk_columns", "chunk_gradient", "fused_one_pass", "fused_gradient")
TABLES = Path(__file__).with_name("tables")


def table_path(architecture: int) -> Path:
    """Path of the table of a compute capability such as 90; 0 is the interpreter."""
    return TABLES / (f"sm_{architecture}.json" if architecture else "interpreter.json")


@functools.cache
def table(architecture: int) -> dict:
    """The table of this architecture, or of the nearest older one that has a table."""
    known = sorted(int(path.stem.removeprefix("sm_")) for path in TABLES.glob("sm_*.json"))
    if architecture:
        architecture = max((a for a in known if a <= architecture), default=known[0])
    return json.loads(table_path(architecture).read_text())


def tiles(kernel: str, shape_class: str, architecture: int) -> dict[str, int]:
    """Keyword arguments of a launch of this kernel: BLOCK_... as upper bounds, num_warps, num_stages."""
    block = table(architecture)["kernels"][kernel][shape_class]
    return block | {"enable_fp_fusion": False} if kernel in _UNFUSED else block


def clamp_block(block: dict[str, int], name: str, size: int) -> dict[str, int]:
    """`block` with the tile size `name` no larger than `size` needs, and fewer warps for a smaller tile."""
    smaller = min(block[name], max(16, triton.next_power_of_2(size)))
    warps = max(1, block.get("num_warps", 4) * smaller // block[name])
    return block | {name: smaller, "num_warps": warps}
