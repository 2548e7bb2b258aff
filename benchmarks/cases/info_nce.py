"""`info_nce`: large batches, where products are all; small ones; long rows, as a fine scale has; two bytes.

The teacher is frozen. Counted in the FLOPs of the products that a loss without a B x B matrix needs; bytes
are both sides read and the student's gradient written.
"""

import math
from functools import partial

import torch

import lfcc_kernels as lk
from benchmarks import libraries, machine, peers
from benchmarks.cases.base import MODES, TEMPERATURE, Candidate, Case, Step, compiled, rows


def cases(tiny: bool) -> list[Case]:
    return _for_gpu(tiny) if machine.HERE.device.type == "cuda" else _for_cpu(tiny)


def _for_cpu(tiny: bool) -> list[Case]:
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


def _for_gpu(tiny: bool) -> list[Case]:
    two_bytes = [
        _one_way(batch, dim, mode, tiny, dtype=torch.bfloat16, compile=mode != "fwd" and (batch, dim) in _COMPILED)
        for batch, dim in _GPU_SHAPES
        for mode in MODES
    ]
    return [
        *two_bytes,
        _symmetric(8192, 512, tiny, dtype=torch.bfloat16),
        _one_way(8192, 512, "fwd+bwd", tiny, dtype=torch.float16),
        *(_one_way(4096, 512, mode, tiny) for mode in MODES),
    ]


_GPU_SHAPES = (  # those that goals are set for come first
    *((8192, 512), (8192, 1024), (8192, 2048), (16384, 512), (32768, 512)),
    *((2048, 512), (2048, 2048), (1024, 512), (256, 512), (256, 12288)),
    *((8192, 128), (4096, 512)),
)
_COMPILED = ((8192, 512), (2048, 512), (1024, 512))  # compiling takes seconds


def _one_way(
    batch: int,
    dim: int,
    mode: str,
    tiny: bool,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    memory: bool = False,
) -> Case:
    eager: dict[str, Candidate] = {"eager": peers.contrast_dense}
    chunked: dict[str, Candidate] = {"linear_cross_entropy": peers.contrast_linear_cross_entropy}
    if machine.HERE.device.type == "cuda":
        chunked |= {
            "memeff": libraries.memeff,
            "inf-cl": libraries.inf_cl,
            "cut-cross-entropy": libraries.cut_cross_entropy,
            "liger-kernel": libraries.liger,
        }
    else:
        chunked = {"row blocks": peers.contrast_row_blocks} | chunked
    return _case(
        "one-way",
        (batch, dim),
        mode,
        tiny,
        products=1 if mode == "fwd" else 2,
        eager=eager,
        others=chunked,
        dtype=dtype,
        compile=compile,
        memory=memory,
    )


def _symmetric(batch: int, dim: int, tiny: bool, dtype: torch.dtype = torch.float32) -> Case:
    others: dict[str, Candidate] = {}
    if machine.HERE.device.type == "cuda":
        others = {
            "open_clip": libraries.open_clip,
            "memeff": libraries.memeff_symmetric,
            "inf-cl": libraries.inf_cl_symmetric,
        }
    return _case(
        "symmetric",
        (batch, dim),
        "fwd+bwd",
        tiny,
        products=3,
        eager={"eager": peers.contrast_dense_symmetric},
        others=others,
        dtype=dtype,
    )


def _case(
    label: str,
    shape: tuple[int, int],
    mode: str,
    tiny: bool,
    products: int,
    eager: dict[str, Candidate],
    others: dict[str, Candidate],
    dtype: torch.dtype,
    compile: bool = False,
    memory: bool = False,
) -> Case:
    shape = (shape[0] // 64, shape[1] // 16) if tiny else shape
    direction = "symmetric" if label == "symmetric" else "student_to_teacher"
    moved = (2 if mode == "fwd" else 3) * math.prod(shape) * dtype.itemsize
    eager, others = (
        {name: partial(call, temperature=TEMPERATURE) for name, call in some.items()} for some in (eager, others)
    )
    return Case(
        "info_nce",
        label,
        shape,
        mode,
        lambda: rows(shape, mode != "fwd", dtype),
        {
            "ours": partial(lk.info_nce, temperature=TEMPERATURE, direction=direction),
            **eager,
            **(compiled(eager) if compile else {}),
            **others,
        },
        (Step(moved, 2 * products * shape[0] ** 2 * shape[1]),),
        f"{2 * products} B^2 D FLOPs",
        dtype=dtype,
        memory=memory,
    )
