"""`info_nce`: large batches, where products are all; small ones; long rows, as a fine scale has; two bytes.

The teacher is frozen. "nt-xent" is SimCLR's loss of two views that both learn, each row against all other rows of both;
its batch is that of one view. Counted in the FLOPs of the products that a loss without a B x B matrix needs; bytes are
both sides read and the gradients written.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import lfcc_kernels as lk
from lfcc_kernels.bench import machine, peers
from lfcc_kernels.bench.cases.base import MODES, TEMPERATURE, Candidate, Case, Step, compiled, rows
from lfcc_kernels.bench.cases.conversions import in_two_bytes, raised, unconverted
from lfcc_kernels.bench.peers import libraries


def cases(tiny: bool, dtype: torch.dtype | None) -> list[Case]:
    return _for_gpu(tiny, dtype) if machine.HERE.device.type == "cuda" else _for_cpu(tiny, dtype)


def _for_cpu(tiny: bool, dtype: torch.dtype | None) -> list[Case]:
    four_bytes, two_bytes = dtype or torch.float32, dtype or torch.bfloat16
    one_way = [
        case
        for mode in MODES
        for case in (
            _one_way(4096, 512, mode, tiny, four_bytes, compile=True, memory=mode != "fwd"),
            _one_way(4096, 128, mode, tiny, four_bytes, memory=mode != "fwd"),
            _one_way(1024, 512, mode, tiny, four_bytes, compile=True, quick=mode != "fwd"),
            _one_way(256, 512, mode, tiny, four_bytes),
            _one_way(128, 512, mode, tiny, four_bytes),
            _one_way(128, 12288, mode, tiny, four_bytes),
            _one_way(1024, 512, mode, tiny, two_bytes),
        )
    ]
    symmetric = [_symmetric(batch, 512, tiny, four_bytes) for batch in (4096, 1024)]
    return [*one_way, *symmetric, *(_nt_xent(batch, 128, tiny, four_bytes) for batch in (128, 512))]


def _for_gpu(tiny: bool, dtype: torch.dtype | None) -> list[Case]:
    four_bytes, two_bytes = dtype or torch.float32, dtype or torch.bfloat16
    one_way = [
        _one_way(
            *shape,
            mode,
            tiny,
            two_bytes,
            compile=mode != "fwd" and shape in _COMPILED,
            quick=mode != "fwd" and shape == (1024, 512),
        )
        for shape in _GPU_SHAPES
        for mode in MODES
    ]
    return [
        *one_way,
        _symmetric(8192, 512, tiny, two_bytes),
        _one_way(8192, 512, "fwd+bwd", tiny, dtype or torch.float16),
        *(_one_way(4096, 512, mode, tiny, four_bytes) for mode in MODES),
        *(_nt_xent(batch, 128, tiny, two_bytes) for batch in (2048, 128)),
    ]


_GPU_SHAPES = (  # those that goals are set for come first
    *((8192, 512), (8192, 1024), (8192, 2048), (16384, 512), (32768, 512)),
    *((2048, 512), (2048, 2048), (1024, 512), (256, 512), (256, 12288)),
    *((8192, 128), (4096, 512)),
)
_COMPILED = ((8192, 512), (2048, 512), (1024, 512))  # compiling takes seconds


def _one_way(batch: int, dim: int, mode: str, tiny: bool, dtype: torch.dtype, compile: bool = False, **options) -> Case:
    shape = _cut(batch, dim) if tiny else (batch, dim)
    learns = mode != "fwd"
    eager = {"eager": _at(peers.contrast_dense)}
    # On a CPU it is a form that torch compiles, for half a minute.
    takes_time = machine.HERE.device.type == "cpu" and not compile
    cut = {} if takes_time else {"cut-cross-entropy": in_two_bytes(_at(libraries.cut_cross_entropy), dtype)}
    return _case(
        "one-way",
        shape,
        mode,
        lambda: rows(shape, learns, dtype),
        _at(lk.info_nce),
        eager=eager | (compiled(eager) if compile else {}),
        others={
            "row blocks": _at(peers.contrast_row_blocks),
            "linear_cross_entropy": _at(peers.contrast_linear_cross_entropy),
            "SDPA as gradient": in_two_bytes(_at(peers.contrast_attention), dtype),
            "memeff": _at(libraries.memeff),
            "inf-cl": _at(libraries.inf_cl),
            "liger-kernel": _at(libraries.liger),
            "pytorch-metric-learning": _at(libraries.pytorch_metric_learning),
            **cut,
        },
        dtype=dtype,
        pairs=shape[0] ** 2,
        products=1 + learns,
        moved=2 + learns,
        formula="4 B^2 D FLOPs" if learns else "2 B^2 D FLOPs",
        **options,
    )


def _symmetric(batch: int, dim: int, tiny: bool, dtype: torch.dtype) -> Case:
    shape = _cut(batch, dim) if tiny else (batch, dim)
    return _case(
        "symmetric",
        shape,
        "fwd+bwd",
        lambda: rows(shape, True, dtype),
        partial(_at(lk.info_nce), direction="symmetric"),
        eager={"eager": _at(peers.contrast_dense_symmetric)},
        others={
            "open_clip": _at(libraries.open_clip),
            "memeff": _at(libraries.memeff_symmetric),
            "inf-cl": _at(libraries.inf_cl_symmetric),
        },
        dtype=dtype,
        pairs=shape[0] ** 2,
        products=3,
        moved=3,
        formula="6 B^2 D FLOPs",
    )


def _nt_xent(batch: int, dim: int, tiny: bool, dtype: torch.dtype) -> Case:
    shape = _cut(batch, dim) if tiny else (batch, dim)
    ids = torch.arange(2 * shape[0], device=machine.HERE.device)
    partners = ids.roll(shape[0])

    def ours(view: Tensor, other: Tensor) -> Tensor:
        """Equal ids leave each row's pair with itself out."""
        students, teachers = torch.cat((view, other)), torch.cat((other, view))
        return lk.info_nce(students, teachers, temperature=TEMPERATURE, student_ids=ids, teacher_ids=partners)

    def inputs() -> tuple[Tensor, ...]:
        view, other = rows(shape, True, dtype)
        return view, other.requires_grad_()

    return _case(
        "nt-xent",
        shape,
        "fwd+bwd",
        inputs,
        ours,
        eager={"eager": _at(peers.contrast_dense_nt_xent)},
        others={
            "lightly": _at(libraries.lightly_nt_xent),
            "pytorch-metric-learning": _at(libraries.pytorch_metric_learning_nt_xent),
        },
        dtype=dtype,
        pairs=4 * shape[0] ** 2,
        products=2,  # of the 2 B rows: A = z z^T, and (P + P^T) z for both views at once
        moved=4,
        formula="16 B^2 D FLOPs",
        heaps=False,
    )


def _case(
    label: str,
    shape: tuple[int, int],
    mode: str,
    inputs: Callable[[], tuple[Tensor, ...]],
    ours: Candidate,
    eager: dict[str, Candidate],
    others: dict[str, Candidate],
    dtype: torch.dtype,
    pairs: int,
    products: int,
    moved: int,
    **options,
) -> Case:
    """`products` of all pairs of rows, and so many tensors of `shape` moved."""
    return Case(
        "info_nce",
        label,
        shape,
        mode,
        inputs,
        {"ours": ours, **raised(eager, dtype), **unconverted(eager, dtype), **raised(others, dtype)},
        (Step(moved * math.prod(shape) * dtype.itemsize, 2 * products * pairs * shape[1]),),
        dtype=dtype,
        op="info_nce",
        size=pairs,
        **options,
    )


def _at(call: Candidate) -> Candidate:
    return partial(call, temperature=TEMPERATURE)


def _cut(batch: int, dim: int) -> tuple[int, int]:
    return batch // 64, dim // 16
