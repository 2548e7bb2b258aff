"""`info_nce`: large batches, where products are all; small ones; long rows, as a fine scale has; two bytes.

The teacher is frozen. Counted in the FLOPs of the products that a loss without a B x B matrix needs; bytes
are both sides read and the student's gradient written.
"""

import math
from functools import partial

import torch

import lfcc_kernels as lk
from benchmarks import peers
from benchmarks.cases.base import MODES, TEMPERATURE, Candidate, Case, Step, compiled, rows


def cases(tiny: bool) -> list[Case]:
    one_way = [
        case
        for mode in MODES
        for case in (
            _one_way(4096, 512, mode, tiny, compile=True, memory=mode != "fwd"),
            _one_way(4096, 128, mode, tiny, memory=mode != "fwd"),
            _one_way(1024, 512, mode, tiny, compile=True),
            _one_way(256, 512, mode, tiny),
            _one_way(128, 512, mode, tiny),
            _one_way(128, 12288, mode, tiny),
            _one_way(1024, 512, mode, tiny, dtype=torch.bfloat16),
        )
    ]
    return [*one_way, _symmetric(4096, 512, tiny), _symmetric(1024, 512, tiny)]


def _one_way(
    batch: int,
    dim: int,
    mode: str,
    tiny: bool,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    memory: bool = False,
) -> Case:
    eager: dict[str, Candidate] = {"eager": partial(peers.contrast_dense, temperature=TEMPERATURE)}
    chunked = {
        "row blocks": partial(peers.contrast_row_blocks, temperature=TEMPERATURE),
        "linear_cross_entropy": partial(peers.contrast_linear_cross_entropy, temperature=TEMPERATURE),
    }
    return _case(
        "one-way",
        (batch, dim),
        mode,
        tiny,
        products=1 if mode == "fwd" else 2,
        others=eager | (compiled(eager) if compile else {}) | chunked,
        dtype=dtype,
        memory=memory,
    )


def _symmetric(batch: int, dim: int, tiny: bool) -> Case:
    eager: dict[str, Candidate] = {"eager": partial(peers.contrast_dense_symmetric, temperature=TEMPERATURE)}
    return _case("symmetric", (batch, dim), "fwd+bwd", tiny, products=3, others=eager)


def _case(
    label: str,
    shape: tuple[int, int],
    mode: str,
    tiny: bool,
    products: int,
    others: dict[str, Candidate],
    dtype: torch.dtype = torch.float32,
    memory: bool = False,
) -> Case:
    shape = (shape[0] // 64, shape[1] // 16) if tiny else shape
    direction = "symmetric" if label == "symmetric" else "student_to_teacher"
    moved = (2 if mode == "fwd" else 3) * math.prod(shape) * dtype.itemsize
    return Case(
        "info_nce",
        label,
        shape,
        mode,
        lambda: rows(shape, mode != "fwd", dtype),
        {"ours": partial(lk.info_nce, temperature=TEMPERATURE, direction=direction), **others},
        (Step(moved, 2 * products * shape[0] ** 2 * shape[1]),),
        f"{2 * products} B^2 D FLOPs",
        dtype=dtype,
        memory=memory,
    )
