"""The calls of the Triton backend that are compiled offline, and the claims about their kernels.

A case is a name and a call, which creates its own (fake) tensors. To add one, add a line to `CASES`. A claim is checked
on every kernel that it names.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lfcc_kernels.backends.triton import info_nce as nce
from lfcc_kernels.backends.triton import info_nce_foreach as foreach
from lfcc_kernels.backends.triton import lowpass as lp

SCALES = [1, 2, 4]
CELLS = sum(s * s for s in SCALES)

# A claim is a kernel with its module, and a part of the names of the cases to which it applies.
# On sm_90, products of 16-bit operands are warp-group instructions (wgmma).
WGMMA = [
    ("info_nce_fused.one_pass_kernel", ""),
    ("info_nce_fused.gradient_kernel", ""),
    ("info_nce_foreach.products_kernel", ""),
    ("info_nce_foreach.acc_kernel", ""),
    ("lowpass_kernels.forward_kernel", "56x56"),
    ("lowpass_kernels.forward_kernel", "tokens 14x14"),
    ("lowpass_kernels.forward_kernel", "7x7"),
    ("lowpass_kernels.input_grad_kernel", "56x56"),
    ("lowpass_kernels.input_grad_kernel", "tokens 14x14"),
    ("lowpass_kernels.input_grad_kernel", "7x7"),
]

# Every global access of a source line with this text is at least 16 bytes wide.
WIDE = [
    ("lowpass_kernels.forward_kernel", "56x56x256 bfloat16", "tile = tl.load("),
    ("lowpass_kernels.forward_kernel", "56x56x256 float32", "tile = tl.load("),
    ("lowpass_kernels.forward_kernel", "tokens 14x14", "tile = tl.load("),
    ("lowpass_kernels.forward_kernel", "nchw 14x14x256 bfloat16", "tl.load(first + run"),
    ("lowpass_kernels.forward_kernel", "nchw 7x7x512 bfloat16", "tl.load(first + run"),
    ("lowpass_kernels.forward_kernel", "channels_last 7x7", "tile = tl.load("),
    ("lowpass_kernels.input_grad_kernel", "56x56", "tl.store("),
    ("lowpass_kernels.input_grad_kernel", "tokens 14x14", "tl.store("),
    ("lowpass_kernels.input_grad_kernel", "nchw 14x14x256 bfloat16", "tl.store(first + run"),
    ("lowpass_kernels.input_grad_kernel", "nchw 7x7x512 bfloat16", "tl.store(first + run"),
    ("lowpass_kernels.input_grad_kernel", "channels_last 7x7", "tl.store("),
    ("lowpass_kernels.weights_grad_kernel", "56x56", "tile = tl.load("),
    ("lowpass_kernels.weights_grad_kernel", "tokens 14x14", "tile = tl.load("),
    ("lowpass_kernels.weights_grad_kernel", "nchw 14x14x256 bfloat16", "tl.load(first + run"),
    ("lowpass_kernels.weights_grad_kernel", "nchw 7x7x512 bfloat16", "tl.load(first + run"),
    ("lowpass_kernels.weights_grad_kernel", "channels_last 7x7", "tile = tl.load("),
]

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = {"float32": torch.float32, **HALF, "float64": torch.float64}


def _map(dtype: torch.dtype, layout: str, channels: int, height: int, width: int) -> tuple[Tensor, list[int], int]:
    """x, grid and prefix_tokens."""
    if layout == "tokens":
        return torch.empty(32, 1 + height * width, channels, dtype=dtype, device="cuda"), [height, width], 1
    layouts = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
    x = torch.empty(32, channels, height, width, dtype=dtype, device="cuda", memory_format=layouts[layout])
    return x, [], 0


def _filters(x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, cols = (x.new_empty(sum(SCALES), size, dtype=dtype) for size in (height, width))
    return rows, cols


def _lowpass(dtype: torch.dtype, layout: str, size: tuple[int, int, int], learnable: bool) -> Callable[[], object]:
    def call() -> None:
        x, grid, prefix = _map(dtype, layout, *size)
        rows, cols = _filters(x, *size[1:]) if learnable else (None, None)
        grad = x.new_empty(x.shape[0], CELLS, size[0])
        lp.lowpass(x, SCALES, rows, cols, grid, prefix)
        lp.lowpass_input_grad(grad, list(x.shape), layout == "channels_last", SCALES, rows, cols, grid, prefix)
        if rows is not None and cols is not None:
            lp.lowpass_filter_grad(grad, x, SCALES, rows, cols, grid, prefix)

    return call


def _lowpass_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    shapes = [("nchw", (256, 56, 56)), ("channels_last", (256, 56, 56)), ("tokens", (384, 14, 14))]
    shapes += [("nchw", (512, 7, 7)), ("channels_last", (512, 7, 7)), ("nchw", (256, 14, 14)), ("nchw", (3, 5, 9))]
    for layout, size in shapes:
        for name, dtype in DTYPES.items():
            if name in ("float16", "float64") and (layout, size) != ("nchw", (256, 56, 56)):
                continue  # the other layouts behave as with bfloat16 and float32
            for learnable in (False, True):
                kind = "learnable" if learnable else "average"
                case = _lowpass(dtype, layout, size, learnable)
                yield f"lowpass {layout} {size[1]}x{size[2]}x{size[0]} {name} {kind}", case


def _info_nce(dtype: torch.dtype, rows: int, width: int, with_ids: bool) -> Callable[[], object]:
    def call() -> None:
        student = torch.empty(rows, width, dtype=dtype, device="cuda")
        ids = torch.empty(rows, dtype=torch.int64, device="cuda") if with_ids else None
        grad = student.new_empty(rows, dtype=torch.promote_types(dtype, torch.float32))
        pair = (student, torch.empty_like(student), grad.new_empty(()), ids, ids, 0)
        nce.info_nce_one_pass(*pair, True, True)
        for symmetric in (False, True):
            _loss, row_lse, col_lse = nce.info_nce(*pair, symmetric, True, True)
            for of_teacher in (False, True):
                nce.info_nce_grad(grad, *pair, symmetric, True, row_lse, col_lse, of_teacher)

    return call


def _info_nce_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for rows, width in [(4096, 128), (4096, 64), (4096, 512), (100, 33)]:
        for name, dtype in DTYPES.items():
            if width in (64, 33) and name in ("float16", "float64"):
                continue
            yield f"info_nce {rows}x{width} {name}", _info_nce(dtype, rows, width, with_ids=False)
        yield f"info_nce {rows}x{width} bfloat16 ids", _info_nce(torch.bfloat16, rows, width, with_ids=True)
    yield "info_nce 1x1 float32", _info_nce(torch.float32, 1, 1, with_ids=False)  # sizes of 1 become constants


def _foreach(dtype: torch.dtype, rows: int, with_ids: bool) -> Callable[[], object]:
    """Four stages of a Swin-T at three scales."""

    def call() -> None:
        widths = [channels * s * s for channels in (96, 192, 384, 768) for s in SCALES]
        students, teachers = ([torch.empty(rows, w, dtype=dtype, device="cuda") for w in widths] for _ in range(2))
        ids = torch.empty(rows, dtype=torch.int64, device="cuda") if with_ids else None
        temperature = torch.empty((), device="cuda")
        foreach.info_nce_foreach(students, teachers, temperature, ids, ids, 0, True)

    return call


def _foreach_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for name, dtype in DTYPES.items():
        if name != "float64":  # which has no foreach kernels
            yield f"foreach 128 {name}", _foreach(dtype, 128, with_ids=name == "bfloat16")
    yield "foreach 1 float32", _foreach(torch.float32, 1, with_ids=False)


CASES = {**dict(_lowpass_cases()), **dict(_info_nce_cases()), **dict(_foreach_cases())}
