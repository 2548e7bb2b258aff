"""`lowpass`: both layouts, tokens, filters that learn, two-byte elements, and the grids of later stages.

A CIFAR ResNet's stage has sides that halve down to every scale, as blur pools halve them; elsewhere those are skipped.
Counted in bytes alone, X of the map and Y of the pyramid: it is about one FLOP a byte.
"""

import math
from functools import partial

import torch
from torch import Tensor

import lfcc_kernels as lk
from lfcc_kernels.bench import machine, peers
from lfcc_kernels.bench.cases.base import CELLS, MODES, SCALES, Candidate, Case, Step, compiled, features
from lfcc_kernels.bench.cases.conversions import raised, unconverted
from lfcc_kernels.bench.peers import libraries

LARGE = (32, 256, 56, 56)
LARGE_GPU = (256, 256, 56, 56)


def cases(tiny: bool, dtype: torch.dtype | None) -> list[Case]:
    suite = _for_gpu if machine.HERE.device.type == "cuda" else _for_cpu
    return [case for mode in MODES for case in suite(mode, tiny, dtype)]


def _for_cpu(mode: str, tiny: bool, dtype: torch.dtype | None) -> tuple[Case, ...]:
    four_bytes, two_bytes = dtype or torch.float32, dtype or torch.bfloat16
    return (
        _map("nchw", LARGE, mode, tiny, four_bytes, compile=True, blur_pools=True, quick=True),
        _map("channels_last", LARGE, mode, tiny, four_bytes),
        _map("nchw", (32, 512, 28, 28), mode, tiny, four_bytes),
        _map("nchw", (64, 256, 14, 14), mode, tiny, four_bytes),
        _map("nchw", (128, 512, 7, 7), mode, tiny, four_bytes),
        _map("nchw", LARGE, mode, tiny, two_bytes),
        _map("nchw", (256, 64, 32, 32), mode, tiny, four_bytes, blur_pools=True, heaps=False),
        _tokens((128, 197, 384), (14, 14), 1, mode, tiny, four_bytes),
        _learnable(LARGE, mode, tiny, four_bytes),
    )


def _for_gpu(mode: str, tiny: bool, dtype: torch.dtype | None) -> tuple[Case, ...]:
    """A ResNet-50's stages at a batch of 256, and the tokens of a ViT-B."""
    four_bytes, two_bytes = dtype or torch.float32, dtype or torch.bfloat16
    return (
        _map("nchw", LARGE_GPU, mode, tiny, two_bytes, compile=True, blur_pools=True, quick=True),
        _map("nchw", (256, 512, 28, 28), mode, tiny, two_bytes),
        _map("nchw", (256, 1024, 14, 14), mode, tiny, two_bytes),
        _map("nchw", (256, 2048, 7, 7), mode, tiny, two_bytes),
        _map("nchw", (2048, 64, 32, 32), mode, tiny, two_bytes, blur_pools=True),
        _map("channels_last", LARGE_GPU, mode, tiny, two_bytes),
        _tokens((256, 197, 768), (14, 14), 1, mode, tiny, two_bytes),
        _learnable(LARGE_GPU, mode, tiny, two_bytes),
        _map("nchw", (64, 256, 56, 56), mode, tiny, four_bytes),
    )


def _map(
    layout: str,
    shape: tuple[int, int, int, int],
    mode: str,
    tiny: bool,
    dtype: torch.dtype,
    compile: bool = False,
    blur_pools: bool = False,
    **options,
) -> Case:
    shape = _cut(shape) if tiny else shape
    memory_format = torch.contiguous_format if layout == "nchw" else torch.channels_last
    one_gemm = peers.pool_one_gemm if layout == "nchw" else peers.pool_one_gemm_channels_last
    eager: dict[str, Candidate] = {"eager": partial(peers.pool_each_scale, scales=SCALES)}
    product: dict[str, Candidate] = {"one-GEMM": partial(one_gemm, matrix=_matrix(shape[2:], dtype))}
    if compile:
        eager |= compiled(eager)
        product |= compiled(product)
    others: dict[str, Candidate] = {"cascade": partial(peers.pool_cascade, scales=SCALES)}
    if blur_pools:
        others["kornia"] = partial(libraries.kornia, scales=SCALES)
        others["antialiased-cnns"] = partial(libraries.antialiased_cnns, scales=SCALES)
    return Case(
        "lowpass",
        layout,
        shape,
        mode,
        lambda: (features(shape, mode != "fwd", dtype, memory_format),),
        {
            "ours": partial(lk.lowpass, scales=SCALES),
            **eager,
            **raised(product, dtype),
            **unconverted(product, dtype),
            **others,
        },
        *_cost(shape, mode, dtype.itemsize),
        dtype=dtype,
        op="lowpass",
        size=math.prod(shape),
        **options,
    )


def _tokens(
    shape: tuple[int, int, int], grid: tuple[int, int], prefix_tokens: int, mode: str, tiny: bool, dtype: torch.dtype
) -> Case:
    shape = (2, shape[1], 8) if tiny else shape
    matrix = _matrix(grid, dtype)

    def ours(x: Tensor) -> Tensor:
        return lk.lowpass(x, SCALES, grid=grid, prefix_tokens=prefix_tokens)

    def eager(x: Tensor) -> Tensor:
        return peers.pool_each_scale(peers.as_map(x, grid, prefix_tokens), SCALES)

    def one_gemm(x: Tensor) -> Tensor:
        return peers.pool_one_gemm_channels_last(peers.as_map(x, grid, prefix_tokens), matrix)

    product: dict[str, Candidate] = {"one-GEMM": one_gemm}
    return Case(
        "lowpass",
        "tokens",
        shape,
        mode,
        lambda: (features(shape, mode != "fwd", dtype),),
        {"ours": ours, "eager": eager, **raised(product, dtype), **unconverted(product, dtype)},
        *_cost((shape[0], shape[2], *grid), mode, dtype.itemsize),
        dtype=dtype,
        op="lowpass",
        size=math.prod(shape),
    )


def _learnable(shape: tuple[int, int, int, int], mode: str, tiny: bool, dtype: torch.dtype) -> Case:
    shape = _cut(shape) if tiny else shape

    def inputs() -> tuple[Tensor, ...]:
        bank = lk.LowPassPyramid(SCALES, "learnable").bank
        for logits in bank.parameters():
            torch.nn.init.normal_(logits)
        kept = torch.promote_types(dtype, torch.float32)  # the dtype that our filters have
        filters = (f.detach().to(machine.HERE.device, kept).requires_grad_(mode != "fwd") for f in bank(*shape[2:]))
        return features(shape, mode != "fwd", dtype), *filters

    def ours(x: Tensor, row_filters: Tensor, col_filters: Tensor) -> Tensor:
        return lk.lowpass(x, SCALES, row_filters=row_filters, col_filters=col_filters)

    def one_gemm(x: Tensor, row_filters: Tensor, col_filters: Tensor) -> Tensor:
        return peers.pool_one_gemm(x, peers.stacked_filters(row_filters, col_filters, SCALES))

    products = {"eager": partial(peers.filter_each_scale, scales=SCALES), "one-GEMM": one_gemm}
    return Case(
        "lowpass",
        "learnable",
        shape,
        mode,
        inputs,
        {"ours": ours, **raised(products, dtype), **unconverted(products, dtype)},
        *_cost(shape, mode, dtype.itemsize, backward_reads=True),
        dtype=dtype,
        op="lowpass",
        size=math.prod(shape),
    )


def _matrix(grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The stacked averages as a user keeps them for maps of `dtype`: where and in what the product is taken."""
    like = peers.raised(torch.empty(0, dtype=dtype, device=machine.HERE.device))
    return peers.stacked_averages(grid, SCALES).to(like)


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
