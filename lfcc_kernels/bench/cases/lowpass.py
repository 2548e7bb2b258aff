"""Suite `lowpass`: both layouts, tokens, learnable filters, 16-bit elements, and the grids of later stages.

The sides of a CIFAR ResNet's stages halve down to every scale, as blur pools need; other maps skip those. Counted in
bytes alone, X of the map and Y of the pyramid: the op computes about one FLOP per byte.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import lfcc_kernels as lk
from lfcc_kernels.bench.cases.base import (
    CELLS,
    MODES,
    SCALES,
    Candidate,
    Case,
    Step,
    compiled,
    features,
    native_bfloat16,
    upcast_on_cpu,
)
from lfcc_kernels.bench.machine import Machine
from lfcc_kernels.bench.peers import contrast, libraries, pooling

LARGE = (32, 256, 56, 56)
LARGE_GPU = (256, 256, 56, 56)
Shape = tuple[int, int, int, int]


def cases(machine: Machine, dtype: torch.dtype | None) -> list[Case]:
    suite = _for_gpu if machine.gpu else _for_cpu
    float32, bfloat16 = dtype or torch.float32, dtype or torch.bfloat16
    return [case for mode in MODES for case in suite(machine, mode, float32, bfloat16)]


def _for_cpu(machine: Machine, mode: str, float32: torch.dtype, bfloat16: torch.dtype) -> tuple[Case, ...]:
    return (
        _map(machine, "nchw", LARGE, mode, float32, compile=True, blur_pools=True, quick=True),
        _map(machine, "channels_last", LARGE, mode, float32),
        _map(machine, "nchw", (32, 512, 28, 28), mode, float32),
        _map(machine, "nchw", (64, 256, 14, 14), mode, float32),
        _map(machine, "nchw", (128, 512, 7, 7), mode, float32),
        _map(machine, "nchw", LARGE, mode, bfloat16),
        _map(machine, "nchw", (256, 64, 32, 32), mode, float32, blur_pools=True, heaps=False),
        _tokens(machine, (128, 197, 384), (14, 14), 1, mode, float32),
        _learnable(machine, LARGE, mode, float32),
    )


def _for_gpu(machine: Machine, mode: str, float32: torch.dtype, bfloat16: torch.dtype) -> tuple[Case, ...]:
    """The stages of a ResNet-50 at a batch of 256, and the tokens of a ViT-B."""
    return (
        _map(machine, "nchw", LARGE_GPU, mode, bfloat16, compile=True, blur_pools=True, quick=True),
        _map(machine, "nchw", (256, 512, 28, 28), mode, bfloat16),
        _map(machine, "nchw", (256, 1024, 14, 14), mode, bfloat16),
        _map(machine, "nchw", (256, 2048, 7, 7), mode, bfloat16),
        _map(machine, "nchw", (2048, 64, 32, 32), mode, bfloat16, blur_pools=True),
        _map(machine, "channels_last", LARGE_GPU, mode, bfloat16),
        _tokens(machine, (256, 197, 768), (14, 14), 1, mode, bfloat16),
        _learnable(machine, LARGE_GPU, mode, bfloat16),
        _map(machine, "nchw", (64, 256, 56, 56), mode, float32),
    )


def _map(
    machine: Machine,
    layout: str,
    shape: Shape,
    mode: str,
    dtype: torch.dtype,
    compile: bool = False,
    blur_pools: bool = False,
    **options,
) -> Case:
    shape = _narrow(shape) if machine.tiny else shape
    memory_format = torch.contiguous_format if layout == "nchw" else torch.channels_last
    one_gemm = pooling.one_gemm if layout == "nchw" else pooling.one_gemm_channels_last
    eager: dict[str, Candidate] = {"eager": partial(pooling.pool_each_scale, scales=SCALES)}
    product: dict[str, Candidate] = {"one-GEMM": partial(one_gemm, matrix=_matrix(machine, shape[2:], dtype))}
    if compile:
        eager |= compiled(machine, eager)
        product |= compiled(machine, product)
    others: dict[str, Candidate] = {"cascade": partial(pooling.cascade, scales=SCALES)}
    if blur_pools:
        others["kornia"] = partial(libraries.kornia, scales=SCALES)
        others["antialiased-cnns"] = partial(libraries.antialiased_cnns, scales=SCALES)
    lowpass: Candidate = partial(lk.lowpass, scales=SCALES)
    candidates = {"lfcc": lowpass} | eager | _products(machine, product, dtype) | others

    def inputs() -> tuple[Tensor, ...]:
        return (features(machine, shape, mode != "fwd", dtype, memory_format),)

    return _case(layout, shape, mode, dtype, inputs, candidates, _cost(shape, mode, dtype.itemsize), **options)


def _tokens(
    machine: Machine,
    shape: tuple[int, int, int],
    grid: tuple[int, int],
    prefix_tokens: int,
    mode: str,
    dtype: torch.dtype,
) -> Case:
    shape = (2, shape[1], 8) if machine.tiny else shape
    matrix = _matrix(machine, grid, dtype)

    def lowpass(x: Tensor) -> Tensor:
        return lk.lowpass(x, SCALES, grid=grid, prefix_tokens=prefix_tokens)

    def eager(x: Tensor) -> Tensor:
        return pooling.pool_each_scale(pooling.as_map(x, grid, prefix_tokens), SCALES)

    def one_gemm(x: Tensor) -> Tensor:
        return pooling.one_gemm_channels_last(pooling.as_map(x, grid, prefix_tokens), matrix)

    def inputs() -> tuple[Tensor, ...]:
        return (features(machine, shape, mode != "fwd", dtype),)

    candidates = {"lfcc": lowpass, "eager": eager} | _products(machine, {"one-GEMM": one_gemm}, dtype)
    cost = _cost((shape[0], shape[2], *grid), mode, dtype.itemsize)
    return _case("tokens", shape, mode, dtype, inputs, candidates, cost)


def _learnable(machine: Machine, shape: Shape, mode: str, dtype: torch.dtype) -> Case:
    shape = _narrow(shape) if machine.tiny else shape

    def inputs() -> tuple[Tensor, ...]:
        bank = lk.LowPassPyramid(SCALES, "learnable").bank
        for logits in bank.parameters():
            torch.nn.init.normal_(logits)
        filter_dtype = torch.promote_types(dtype, torch.float32)  # that of the module's filters
        filters = (f.detach().to(machine.device, filter_dtype).requires_grad_(mode != "fwd") for f in bank(*shape[2:]))
        return features(machine, shape, mode != "fwd", dtype), *filters

    def lowpass(x: Tensor, row_filters: Tensor, col_filters: Tensor) -> Tensor:
        return lk.lowpass(x, SCALES, row_filters=row_filters, col_filters=col_filters)

    def one_gemm(x: Tensor, row_filters: Tensor, col_filters: Tensor) -> Tensor:
        return pooling.one_gemm(x, pooling.stacked_filters(row_filters, col_filters, SCALES))

    products: dict[str, Candidate] = {"eager": partial(pooling.filter_each_scale, scales=SCALES), "one-GEMM": one_gemm}
    candidates = {"lfcc": lowpass} | _products(machine, products, dtype)
    cost = _cost(shape, mode, dtype.itemsize, backward_reads=True)
    return _case("learnable", shape, mode, dtype, inputs, candidates, cost)


def _case(
    label: str,
    shape: tuple[int, ...],
    mode: str,
    dtype: torch.dtype,
    inputs: Callable[[], tuple[Tensor, ...]],
    candidates: dict[str, Candidate],
    cost: tuple[tuple[Step, ...], str],
    **options,
) -> Case:
    fields = {"dtype": dtype, "op": "lowpass", "size": math.prod(shape), **options}
    return Case("lowpass", label, shape, mode, inputs, candidates, *cost, **fields)


def _products(machine: Machine, candidates: dict[str, Candidate], dtype: torch.dtype) -> dict[str, Candidate]:
    return upcast_on_cpu(machine, candidates, dtype) | native_bfloat16(machine, candidates, dtype)


def _matrix(machine: Machine, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The stacked averages for maps of `dtype`, on the device and in the dtype of the product."""
    return pooling.stacked_averages(grid, SCALES).to(
        contrast.upcast(torch.empty(0, dtype=dtype, device=machine.device))
    )


def _narrow(shape: Shape) -> Shape:
    return 2, 8, *shape[2:]


def _cost(shape: Shape, mode: str, itemsize: int, backward_reads: bool = False) -> tuple[tuple[Step, ...], str]:
    """Steps and formula; the gradients of filters read the map again."""
    whole, pyramid = math.prod(shape) * itemsize, shape[0] * shape[1] * CELLS * itemsize
    if mode == "fwd":
        return (Step(whole + pyramid),), "X + Y bytes"
    if backward_reads:
        return (Step(3 * whole + 2 * pyramid),), "3 X + 2 Y bytes"
    return (Step(2 * whole + 2 * pyramid),), "2 X + 2 Y bytes"
