"""`lowpass`: both layouts, tokens, filters that learn, two-byte elements, and the grids of later stages.

Counted in bytes alone, X of the map and Y of the pyramid: it is about one FLOP a byte.
"""

import math
from functools import partial

import torch
from torch import Tensor

import lfcc_kernels as lk
from benchmarks import machine, peers
from benchmarks.cases.base import CELLS, MODES, SCALES, Case, Step, compiled, features

LARGE = (32, 256, 56, 56)


LARGE_GPU = (256, 256, 56, 56)


def cases(tiny: bool) -> list[Case]:
    suite = _for_gpu if machine.HERE.device.type == "cuda" else _for_cpu
    return [case for mode in MODES for case in suite(mode, tiny)]


def _for_cpu(mode: str, tiny: bool) -> tuple[Case, ...]:
    return (
        _map("nchw", LARGE, mode, tiny, compile=True),
        _map("channels_last", LARGE, mode, tiny),
        _map("nchw", (32, 512, 28, 28), mode, tiny),
        _map("nchw", (64, 256, 14, 14), mode, tiny),
        _map("nchw", (128, 512, 7, 7), mode, tiny),
        _map("nchw", LARGE, mode, tiny, dtype=torch.bfloat16),
        _tokens((128, 197, 384), (14, 14), 1, mode, tiny),
        _learnable(LARGE, mode, tiny),
    )


def _for_gpu(mode: str, tiny: bool) -> tuple[Case, ...]:
    """A ResNet-50's stages at a batch of 256, and the tokens of a ViT-B."""
    two_bytes = torch.bfloat16
    return (
        _map("nchw", LARGE_GPU, mode, tiny, two_bytes, compile=True),
        _map("nchw", (256, 512, 28, 28), mode, tiny, two_bytes),
        _map("nchw", (256, 1024, 14, 14), mode, tiny, two_bytes),
        _map("nchw", (256, 2048, 7, 7), mode, tiny, two_bytes),
        _map("channels_last", LARGE_GPU, mode, tiny, two_bytes),
        _tokens((256, 197, 768), (14, 14), 1, mode, tiny, two_bytes),
        _learnable(LARGE_GPU, mode, tiny, two_bytes),
        _map("nchw", (64, 256, 56, 56), mode, tiny),
    )


def _map(
    layout: str,
    shape: tuple[int, int, int, int],
    mode: str,
    tiny: bool,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
) -> Case:
    shape = _cut(shape) if tiny else shape
    memory_format = torch.contiguous_format if layout == "nchw" else torch.channels_last
    one_gemm = peers.pool_one_gemm if layout == "nchw" else peers.pool_one_gemm_channels_last
    others = {
        "eager": partial(peers.pool_each_scale, scales=SCALES),
        "one-GEMM": partial(one_gemm, matrix=_matrix(shape[2:], dtype)),
    }
    return Case(
        "lowpass",
        layout,
        shape,
        mode,
        lambda: (features(shape, mode != "fwd", dtype, memory_format),),
        {"ours": partial(lk.lowpass, scales=SCALES), **others, **(compiled(others) if compile else {})},
        *_cost(shape, mode, dtype.itemsize),
        dtype=dtype,
    )


def _tokens(
    shape: tuple[int, int, int],
    grid: tuple[int, int],
    prefix_tokens: int,
    mode: str,
    tiny: bool,
    dtype: torch.dtype = torch.float32,
) -> Case:
    shape = (2, shape[1], 8) if tiny else shape
    matrix = _matrix(grid, dtype)

    def ours(x: Tensor) -> Tensor:
        return lk.lowpass(x, SCALES, grid=grid, prefix_tokens=prefix_tokens)

    def eager(x: Tensor) -> Tensor:
        return peers.pool_each_scale(peers.as_map(x, grid, prefix_tokens), SCALES)

    def one_gemm(x: Tensor) -> Tensor:
        return peers.pool_one_gemm_channels_last(peers.as_map(x, grid, prefix_tokens), matrix)

    return Case(
        "lowpass",
        "tokens",
        shape,
        mode,
        lambda: (features(shape, mode != "fwd", dtype),),
        {"ours": ours, "eager": eager, "one-GEMM": one_gemm},
        *_cost((shape[0], shape[2], *grid), mode, dtype.itemsize),
        dtype=dtype,
    )


def _learnable(shape: tuple[int, int, int, int], mode: str, tiny: bool, dtype: torch.dtype = torch.float32) -> Case:
    shape = _cut(shape) if tiny else shape

    def inputs() -> tuple[Tensor, ...]:
        bank = lk.LowPassPyramid(SCALES, "learnable").bank
        for logits in bank.parameters():
            torch.nn.init.normal_(logits)
        filters = (f.detach().to(machine.HERE.device).requires_grad_(mode != "fwd") for f in bank(*shape[2:]))
        return features(shape, mode != "fwd", dtype), *filters

    def ours(x: Tensor, row_filters: Tensor, col_filters: Tensor) -> Tensor:
        return lk.lowpass(x, SCALES, row_filters=row_filters, col_filters=col_filters)

    def one_gemm(x: Tensor, row_filters: Tensor, col_filters: Tensor) -> Tensor:
        return peers.pool_one_gemm(x, peers.stacked_filters(row_filters, col_filters, SCALES))

    return Case(
        "lowpass",
        "learnable",
        shape,
        mode,
        inputs,
        {"ours": ours, "eager": partial(peers.filter_each_scale, scales=SCALES), "one-GEMM": one_gemm},
        *_cost(shape, mode, dtype.itemsize, backward_reads=True),
        dtype=dtype,
    )


def _matrix(grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The stacked averages as a user keeps them for maps of `dtype`: where and in what the product is taken."""
    return peers.stacked_averages(grid, SCALES).to(
        peers.raised(torch.empty(0, dtype=dtype, device=machine.HERE.device))
    )


def _cut(shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    return 2, 8, *shape[2:]


def _cost(
    shape: tuple[int, int, int, int], mode: str, itemsize: int, backward_reads: bool = False
) -> tuple[tuple[Step, ...], str]:
    """Steps and formula; the gradients of filters read the map again."""
    whole, pyramid = math.prod(shape) * itemsize, shape[0] * shape[1] * CELLS * itemsize
    if mode == "fwd":
        return (Step(whole + pyramid),), "X + Y bytes"
    if backward_reads:
        return (Step(3 * whole + 2 * pyramid),), "3 X + 2 Y bytes"
    return (Step(2 * whole + 2 * pyramid),), "2 X + 2 Y bytes"
