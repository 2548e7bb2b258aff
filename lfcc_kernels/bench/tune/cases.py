"""The cases of `lfcc bench --tune`: ops as a training step calls them, each with eager as its reference.

A case tunes the tiles that its launchers look up in the table.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lfcc_kernels.backends import eager
from lfcc_kernels.backends.triton import DEVICE
from lfcc_kernels.backends.triton import info_nce as nce
from lfcc_kernels.backends.triton import info_nce_foreach as foreach
from lfcc_kernels.backends.triton import lowpass as lp

Results = Sequence[Tensor]

SCALES = [1, 2, 4]
CELLS = sum(s * s for s in SCALES)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

# By shape class. float64 has no cases: `auto` selects eager for it on a GPU.
TYPES = {"2": torch.bfloat16, "4": torch.float32}
# Deviation from eager, relative to its largest value, that rounding explains.
TOLERANCES = {torch.bfloat16: 3e-2, torch.float32: 1e-3}

# Entries of the table that always select one algorithm.
FUSED, CHUNKS = {"widest": 1 << 30, "fewest_rows": 0}, {"widest": 0, "fewest_rows": 0}
BATCHED, SEQUENTIAL = 1 << 60, 0


@dataclass(frozen=True)
class Sizes:
    """Shapes of the cases; those of pairs are (rows of each side, width)."""

    maps: Sequence[tuple[str, tuple[int, int, int, int]]] = (
        ("nchw", (256, 256, 56, 56)),
        ("channels_last", (256, 256, 56, 56)),
        ("nchw", (256, 1024, 14, 14)),
    )
    fused: Sequence[tuple[int, int]] = ((8192, 128), (1024, 128))
    chunks: Sequence[tuple[int, int]] = ((8192, 128), (8192, 512), (1024, 512))
    foreach: Sequence[int] = (128, 256)
    foreach_channels: Sequence[int] = (64, 128, 256, 512)  # one per stage; each scale of a stage is a pair
    crossover_rows: Sequence[int] = (512, 1024, 2048, 4096, 8192)
    crossover_widths: Sequence[int] = (64, 128, 256, 512)
    crossover_foreach: Sequence[int] = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Case:
    """One call of an op. `triton` and `eager` are functions of `inputs()` whose results must agree."""

    name: str
    inputs: Callable[[], tuple]
    triton: Callable[..., Results]
    eager: Callable[..., Results]
    tolerance: float
    settings: Mapping[str, Any] = field(default_factory=dict)  # entries of the table during the case


@dataclass(frozen=True)
class Crossover:
    """An entry of the table that selects one of two algorithms by the size of a call."""

    path: tuple[str, ...]
    ways: tuple[Any, Any]  # values of the entry that always select the first and the second algorithm
    cases: Mapping[Hashable, Case]  # by size
    rules: Sequence[Any]  # candidates for the entry
    takes_first: Callable[[Any, Any], bool]  # whether a rule selects the first algorithm at a size


def kernel_cases(sizes: Sizes) -> list[Case]:
    """Cases that together run every kernel."""
    cases: list[Case] = []
    for dtype in TYPES.values():
        for layout, size in sizes.maps:
            cases += _lowpass_cases(layout, size, dtype)
        for way, pairs in ((FUSED, sizes.fused), (CHUNKS, sizes.chunks)):
            for rows, width in pairs:
                cases += _info_nce_cases(rows, width, dtype, {"fused": dict.fromkeys(TYPES, way)})
        cases += [_foreach_case(rows, sizes, dtype, {"foreach_products": BATCHED}) for rows in sizes.foreach]
    return cases


def chunk_cases(sizes: Sizes) -> list[Case]:
    """The cases whose time depends on the size of a chunk."""
    chunks = {"fused": dict.fromkeys(TYPES, CHUNKS)}
    return [case for case in kernel_cases(sizes) if case.settings == chunks]


def crossovers(sizes: Sizes) -> Iterator[Crossover]:
    """Between fused tiles and chunks, for each dtype class; and between batched and sequential pairs."""
    rules = [{"widest": w, "fewest_rows": r} for w in sizes.crossover_widths for r in sizes.crossover_rows]
    for shape_class, dtype in TYPES.items():
        yield Crossover(
            path=("fused", shape_class),
            ways=(FUSED, CHUNKS),
            cases={
                (rows, width): next(_info_nce_cases(rows, width, dtype, {}))
                for rows in sizes.crossover_rows
                for width in sizes.crossover_widths
            },
            rules=[CHUNKS, *rules],
            takes_first=lambda rule, at: at[0] >= rule["fewest_rows"] and at[1] <= rule["widest"],
        )
    pairs = len(sizes.foreach_channels) * len(SCALES)
    products = {pairs * rows * rows: rows for rows in sizes.crossover_foreach}
    yield Crossover(
        path=("foreach_products",),
        ways=(BATCHED, SEQUENTIAL),
        cases={at: _foreach_case(rows, sizes, torch.bfloat16, {}) for at, rows in products.items()},
        rules=[SEQUENTIAL, *products],
        takes_first=lambda rule, at: at <= rule,
    )


def _lowpass_cases(layout: str, size: tuple[int, int, int, int], dtype: torch.dtype) -> Iterator[Case]:
    batch, channels, height, width = size
    average: tuple[None, None, list[int], int] = (None, None, [], 0)
    channels_last = layout == "channels_last"

    def inputs() -> tuple[Tensor, ...]:
        x = _randn(*size, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
        rows, cols = (_randn(sum(SCALES), side, dtype=torch.float32) for side in (height, width))
        return x, rows, cols, _randn(batch, CELLS, channels, dtype=dtype)

    ops: dict[str, tuple[Callable[..., Results], Callable[..., Results]]] = {
        "average": (
            lambda x, rows, cols, grad: [lp.lowpass(x, SCALES, *average)],
            lambda x, rows, cols, grad: [eager.lowpass(x, SCALES, *average)],
        ),
        "filters": (
            lambda x, rows, cols, grad: [lp.lowpass(x, SCALES, rows, cols, [], 0)],
            lambda x, rows, cols, grad: [eager.lowpass(x, SCALES, rows, cols, [], 0)],
        ),
        "input gradient": (
            lambda x, rows, cols, grad: [lp.lowpass_input_grad(grad, list(size), channels_last, SCALES, *average)],
            lambda x, rows, cols, grad: _gradients(lambda x: eager.lowpass(x, SCALES, *average), [x], grad),
        ),
        "filter gradient": (
            lambda x, rows, cols, grad: lp.lowpass_filter_grad(grad, x, SCALES, rows, cols, [], 0),
            lambda x, rows, cols, grad: _gradients(
                lambda rows, cols: eager.lowpass(x, SCALES, rows, cols, [], 0), [rows, cols], grad
            ),
        ),
    }
    for name, (triton, oracle) in ops.items():
        yield Case(f"lowpass {name} {layout} {size} {dtype}", inputs, triton, oracle, TOLERANCES[dtype])


def _info_nce_cases(rows: int, width: int, dtype: torch.dtype, settings: Mapping[str, Any]) -> Iterator[Case]:
    options = torch.tensor(0.1), None, None, 0  # temperature, ids, positive_offset

    def inputs() -> tuple[Tensor, ...]:
        student, teacher = _randn(rows, width, dtype=dtype), _randn(rows, width, dtype=dtype)
        logits = F.normalize(student.float()) @ F.normalize(teacher.float()).t() / 0.1
        return student, teacher, _randn(rows, dtype=torch.float32), logits.logsumexp(1), logits.logsumexp(0)

    def losses(student: Tensor, teacher: Tensor, symmetric: bool) -> Tensor:
        return eager.info_nce(student, teacher, *options, symmetric, True, False)

    ops: dict[str, tuple[Callable[..., Results], Callable[..., Results]]] = {
        "one pass": (
            lambda s, t, grad, row_lse, col_lse: nce.info_nce_one_pass(s, t, *options, True, True)[:3],
            lambda s, t, grad, row_lse, col_lse: [
                losses(s, t, False).mean(),
                row_lse,
                *_gradients(lambda s: losses(s, t, False), [s], torch.ones_like(grad)),
            ],
        ),
        "symmetric": (
            lambda s, t, grad, row_lse, col_lse: nce.info_nce(s, t, *options, True, True, True),
            lambda s, t, grad, row_lse, col_lse: [losses(s, t, True).mean(), row_lse, col_lse],
        ),
        "symmetric gradient": (
            lambda s, t, grad, *lse: nce.info_nce_grad(grad, s, t, *options, True, True, lse[0], lse[1], False)[:1],
            lambda s, t, grad, *lse: _gradients(lambda s: losses(s, t, True), [s], grad),
        ),
    }
    for name, (triton, oracle) in ops.items():
        yield Case(f"info_nce {name} {(rows, width)} {dtype}", inputs, triton, oracle, TOLERANCES[dtype], settings)


def _foreach_case(rows: int, sizes: Sizes, dtype: torch.dtype, settings: Mapping[str, Any]) -> Case:
    widths = [channels * s * s for channels in sizes.foreach_channels for s in SCALES]
    options = torch.tensor(0.1), None, None, 0

    def inputs() -> tuple[list[Tensor], ...]:
        students, teachers = ([_randn(rows, width, dtype=dtype) for width in widths] for _ in range(2))
        return students, teachers

    def triton(students: list[Tensor], teachers: list[Tensor]) -> Results:
        return foreach.info_nce_foreach(students, teachers, *options, True)[:2]

    def oracle(students: list[Tensor], teachers: list[Tensor]) -> Results:
        def losses(*students: Tensor) -> Tensor:
            pairs = zip(students, teachers, strict=True)
            return torch.stack([eager.info_nce(s, t, *options, False, True, False) for s, t in pairs])

        expected = losses(*students)
        gradients = _gradients(losses, students, torch.ones_like(expected))
        return [expected.mean(1), torch.cat(gradients, dim=1)]

    return Case(f"info_nce_foreach {rows} {widths} {dtype}", inputs, triton, oracle, TOLERANCES[dtype], settings)


def _gradients(f: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*leaves), leaves, grad)


def _randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)
