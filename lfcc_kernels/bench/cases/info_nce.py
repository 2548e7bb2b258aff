"""Suite `info_nce`: large batches, which products dominate; small batches; long rows, as of a fine scale; 16-bit rows.

The teacher is frozen. "nt-xent" is SimCLR's loss of two trained views, each row against all other rows of both; its
batch is that of one view. Counted in the FLOPs of the products that a loss without a B x B matrix needs; bytes are both
sides read and the gradients written.
"""

import math
from functools import partial

import torch
from torch import Tensor

import lfcc_kernels as lk
from lfcc_kernels.bench.cases.base import (
    MODES,
    TEMPERATURE,
    Candidate,
    Case,
    Step,
    bfloat16_on_gpu,
    compiled,
    native_bfloat16,
    rows,
    upcast_on_cpu,
)
from lfcc_kernels.bench.machine import Machine
from lfcc_kernels.bench.peers import contrast, libraries

GPU_SHAPES = (  # those with targets come first
    *((8192, 512), (8192, 1024), (8192, 2048), (16384, 512), (32768, 512)),
    *((2048, 512), (2048, 2048), (1024, 512), (256, 512), (256, 12288)),
    *((8192, 128), (4096, 512)),
)
COMPILED = ((8192, 512), (2048, 512), (1024, 512))  # compiling takes seconds
Shape = tuple[int, int]


def cases(machine: Machine, dtype: torch.dtype | None) -> list[Case]:
    suite = _for_gpu if machine.gpu else _for_cpu
    return suite(machine, dtype or torch.float32, dtype or torch.bfloat16, dtype or torch.float16)


def _for_cpu(machine: Machine, float32: torch.dtype, bfloat16: torch.dtype, _: torch.dtype) -> list[Case]:
    one_way = [
        case
        for mode in MODES
        for case in (
            _one_way(machine, (4096, 512), mode, float32, compile=True, memory=mode != "fwd"),
            _one_way(machine, (4096, 128), mode, float32, memory=mode != "fwd"),
            _one_way(machine, (1024, 512), mode, float32, compile=True, quick=mode != "fwd"),
            _one_way(machine, (256, 512), mode, float32),
            _one_way(machine, (128, 512), mode, float32),
            _one_way(machine, (128, 12288), mode, float32),
            _one_way(machine, (1024, 512), mode, bfloat16),
        )
    ]
    symmetric = [_symmetric(machine, (batch, 512), float32) for batch in (4096, 1024)]
    return [*one_way, *symmetric, *(_nt_xent(machine, (batch, 128), float32) for batch in (128, 512))]


def _for_gpu(machine: Machine, float32: torch.dtype, bfloat16: torch.dtype, float16: torch.dtype) -> list[Case]:
    def one_way(shape: Shape, mode: str) -> Case:
        learn = mode != "fwd"
        quick, compile = learn and shape == (1024, 512), learn and shape in COMPILED
        return _one_way(machine, shape, mode, bfloat16, compile, quick=quick)

    return [
        *(one_way(shape, mode) for shape in GPU_SHAPES for mode in MODES),
        _symmetric(machine, (8192, 512), bfloat16),
        _one_way(machine, (8192, 512), "fwd+bwd", float16),
        *(_one_way(machine, (4096, 512), mode, float32) for mode in MODES),
        *(_nt_xent(machine, (batch, 128), bfloat16) for batch in (2048, 128)),
    ]


def _one_way(machine: Machine, shape: Shape, mode: str, dtype: torch.dtype, compile: bool = False, **options) -> Case:
    learn = mode != "fwd"
    eager: dict[str, Candidate] = {"eager": _bind(contrast.dense)}
    others: dict[str, Candidate] = {
        "row blocks": _bind(contrast.row_blocks),
        "linear_cross_entropy": _bind(contrast.linear_cross_entropy),
        "SDPA as gradient": bfloat16_on_gpu(machine, _bind(contrast.attention), dtype),
        "memeff": _bind(libraries.memeff),
        "inf-cl": _bind(libraries.inf_cl),
        "liger-kernel": _bind(libraries.liger),
        "pytorch-metric-learning": _bind(libraries.pytorch_metric_learning),
    }
    if compile or machine.gpu:  # on a CPU torch compiles cut-cross-entropy for half a minute
        cut = partial(_bind(libraries.cut_cross_entropy), compile=machine.size == "full")
        others["cut-cross-entropy"] = bfloat16_on_gpu(machine, cut, dtype)
    return _case(
        machine,
        "one-way",
        shape,
        mode,
        dtype,
        _bind(lk.info_nce),
        eager | (compiled(machine, eager) if compile else {}),
        others,
        products=1 + learn,
        moved=2 + learn,
        formula="4 B^2 D FLOPs" if learn else "2 B^2 D FLOPs",
        **options,
    )


def _symmetric(machine: Machine, shape: Shape, dtype: torch.dtype) -> Case:
    return _case(
        machine,
        "symmetric",
        shape,
        "fwd+bwd",
        dtype,
        partial(_bind(lk.info_nce), direction="symmetric"),
        {"eager": _bind(contrast.dense_symmetric)},
        {
            "open_clip": _bind(libraries.open_clip),
            "memeff": _bind(libraries.memeff_symmetric),
            "inf-cl": _bind(libraries.inf_cl_symmetric),
        },
        products=3,
        moved=3,
        formula="6 B^2 D FLOPs",
    )


def _nt_xent(machine: Machine, shape: Shape, dtype: torch.dtype) -> Case:
    batch, _ = _narrow(machine, shape)
    ids = torch.arange(2 * batch, device=machine.device)
    partners = ids.roll(batch)

    def info_nce(view: Tensor, other: Tensor) -> Tensor:
        """Equal ids exclude each row's pair with itself."""
        students, teachers = torch.cat((view, other)), torch.cat((other, view))
        return lk.info_nce(students, teachers, temperature=TEMPERATURE, student_ids=ids, teacher_ids=partners)

    return _case(
        machine,
        "nt-xent",
        shape,
        "fwd+bwd",
        dtype,
        info_nce,
        {"eager": _bind(contrast.dense_nt_xent)},
        {
            "lightly": _bind(libraries.lightly_nt_xent),
            "pytorch-metric-learning": _bind(libraries.pytorch_metric_learning_nt_xent),
        },
        products=2,  # of the 2 B rows: A = z z^T, and (P + P^T) z for both views at once
        moved=4,
        formula="16 B^2 D FLOPs",
        views=2,
        heaps=False,
    )


def _case(
    machine: Machine,
    label: str,
    shape: Shape,
    mode: str,
    dtype: torch.dtype,
    info_nce: Candidate,
    eager: dict[str, Candidate],
    others: dict[str, Candidate],
    products: int,
    moved: int,
    views: int = 1,
    **options,
) -> Case:
    """`products` of all pairs of rows, and `moved` tensors of `shape`; with two views both sides are trained."""
    shape = _narrow(machine, shape)
    pairs = (views * shape[0]) ** 2

    def inputs() -> tuple[Tensor, Tensor]:
        student, teacher = rows(machine, shape, mode != "fwd", dtype)
        return student, teacher.requires_grad_(views == 2)

    candidates = {
        "lfcc": info_nce,
        **upcast_on_cpu(machine, eager, dtype),
        **native_bfloat16(machine, eager, dtype),
        **upcast_on_cpu(machine, others, dtype),
    }
    steps = (Step(moved * math.prod(shape) * dtype.itemsize, 2 * products * pairs * shape[1]),)
    options |= {"dtype": dtype, "op": "info_nce", "size": pairs}
    return Case("info_nce", label, shape, mode, inputs, candidates, steps, **options)


def _bind(call: Candidate) -> Candidate:
    return partial(call, temperature=TEMPERATURE)


def _narrow(machine: Machine, shape: Shape) -> Shape:
    return (shape[0] // 64, shape[1] // 16) if machine.tiny else shape
