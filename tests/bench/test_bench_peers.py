"""Each peer agrees with plain loops in float64, value and gradients, or raises with the reason that it cannot run."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import loop_info_nce, loop_lowpass
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lfcc_kernels.bench.cases import WithConversion, base, info_nce, lowpass, overhead
from lfcc_kernels.bench.machine import Cpu, Cuda
from lfcc_kernels.bench.peers import contrast, libraries, pooling, whole_loss

SCALES = (2, 4, 1)  # unsorted: peers must keep the order


def agree(peer: Callable[..., Tensor], truth: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The values are equal, and so are the gradients of all inputs that require one."""
    try:
        got = peer(*inputs)
    except ImportError as reason:
        pytest.skip(str(reason))
    expected = truth(*inputs)
    rtol = 1e-5 if got.dtype == torch.float32 else 1e-8  # cut-cross-entropy has logits in float32
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=rtol * 1e-3)
    learn, upstream = [x for x in inputs if x.requires_grad], torch.randn_like(expected)
    gradients = torch.autograd.grad(got, learn, upstream.to(got.dtype)), torch.autograd.grad(expected, learn, upstream)
    torch.testing.assert_close(*gradients, rtol=rtol, atol=rtol * 1e-3)


def pair(count: int = 37, dim: int = 24) -> tuple[Tensor, Tensor]:
    teacher = torch.randn(count, dim, dtype=torch.float64)
    return (teacher + 2 * torch.randn_like(teacher)).requires_grad_(), teacher


@pytest.fixture
def without_compiling() -> Iterator[None]:
    """Functions under torch.compile run uncompiled, which saves seconds."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize(
    ("peer", "rows"),
    [
        (contrast.dense, 37),
        (contrast.linear_cross_entropy, 300),
        (contrast.attention, 300),
        (contrast.row_blocks, 300),  # more than one block, the last of them not full
        (libraries.cut_cross_entropy, 37),
        (libraries.pytorch_metric_learning, 37),
    ],
)
def test_one_way(peer: Callable[..., Tensor], rows: int, without_compiling: None) -> None:
    agree(partial(peer, temperature=0.07), partial(loop_info_nce, temperature=0.07), *pair(rows))


@pytest.mark.parametrize("peer", [contrast.dense_symmetric, libraries.open_clip])
def test_symmetric(peer: Callable[..., Tensor]) -> None:
    agree(partial(peer, temperature=0.07), partial(loop_info_nce, temperature=0.07, direction="symmetric"), *pair())


def loop_nt_xent(view: Tensor, other: Tensor, temperature: float) -> Tensor:
    views, losses = F.normalize(torch.cat((view, other)), dim=1), []
    for i, row in enumerate(views):
        logits = views @ row / temperature
        others = [j for j in range(len(views)) if j != i]
        losses.append(logits[others].logsumexp(0) - logits[(i + len(view)) % len(views)])
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "peer", [contrast.dense_nt_xent, libraries.lightly_nt_xent, libraries.pytorch_metric_learning_nt_xent]
)
def test_nt_xent(peer: Callable[..., Tensor]) -> None:
    view, other = pair()
    agree(partial(peer, temperature=0.5), partial(loop_nt_xent, temperature=0.5), view, other.requires_grad_())


def test_info_nce_with_ids_is_nt_xent() -> None:
    case = next(case for case in info_nce.cases(Cpu("tiny"), torch.float64) if case.label == "nt-xent")
    view, other = pair(*case.shape)
    agree(case.candidates["lfcc"], partial(loop_nt_xent, temperature=0.1), view, other.requires_grad_())


@pytest.mark.parametrize(
    "peer", [pooling.pool_each_scale, pooling.cascade, libraries.kornia, libraries.antialiased_cnns]
)
def test_pooling(peer: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    agree(partial(peer, scales=SCALES), partial(loop_lowpass, scales=SCALES), x)


@pytest.mark.parametrize("peer", [pooling.one_gemm, pooling.one_gemm_channels_last])
def test_pooling_by_one_gemm(peer: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64, requires_grad=True)
    peer = partial(peer, matrix=pooling.stacked_averages((7, 9), SCALES))
    agree(peer, partial(loop_lowpass, scales=SCALES), x)


def test_tokens_viewed_as_a_map() -> None:
    tokens = torch.randn(2, 3 + 4 * 6, 5, dtype=torch.float64, requires_grad=True)
    agree(
        lambda x: pooling.pool_each_scale(pooling.as_map(x, (4, 6), 3), SCALES),
        lambda x: loop_lowpass(x[:, 3:].reshape(2, 4, 6, 5).permute(0, 3, 1, 2), SCALES),
        tokens,
    )


@pytest.mark.parametrize(
    "peer",
    [
        lambda x, rows, cols: pooling.filter_each_scale(x, rows, cols, SCALES),
        lambda x, rows, cols: pooling.one_gemm(x, pooling.stacked_filters(rows, cols, SCALES)),
    ],
)
def test_trainable_filters(peer: Callable[..., Tensor]) -> None:
    shapes = (2, 3, 7, 9), (sum(SCALES), 7), (sum(SCALES), 9)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    agree(peer, lambda x, rows, cols: loop_lowpass(x, SCALES, rows, cols), *inputs)


@pytest.mark.parametrize("form", [whole_loss.pool_each_scale, whole_loss.project_maps, whole_loss.filter_each_scale])
def test_whole_loss(form: Callable[..., Tensor]) -> None:
    grids, widths, scales = (8, 5), ((3, 4), (2, 6)), (1, 4)
    maps = [
        torch.randn(6, c, grid, grid, dtype=torch.float64, requires_grad=side == 0)
        for side in (0, 1)
        for grid, c in zip(grids, [w[side] for w in widths], strict=True)
    ]
    weights = [torch.randn(t, s, dtype=torch.float64, requires_grad=True) for s, t in widths]
    filters = [tuple(torch.randn(2, sum(scales), grid, dtype=torch.float64).unbind()) for grid in grids]
    learnable = form is whole_loss.filter_each_scale

    def peer(*inputs: Tensor) -> Tensor:
        arguments = inputs[:2], inputs[2:4], inputs[4:], *([filters] if learnable else []), scales, 0.1
        return form(*arguments)

    def truth(*inputs: Tensor) -> Tensor:
        losses = []
        for student, teacher, weight, bank in zip(inputs[:2], inputs[2:4], inputs[4:], filters, strict=True):
            pooled = loop_lowpass(student, scales, *(bank if learnable else ()))
            sides = (pooled @ weight.t(), loop_lowpass(teacher, scales))
            for own, others in zip(*(side.split([s * s for s in scales], 1) for side in sides), strict=True):
                losses.append(loop_info_nce(own.flatten(1), others.flatten(1), temperature=0.1))
        return torch.stack(losses).mean()

    agree(peer, truth, *maps, *weights)


@pytest.mark.parametrize(
    "peer",
    [libraries.memeff, libraries.memeff_symmetric, libraries.inf_cl, libraries.inf_cl_symmetric, libraries.liger],
)
def test_peers_that_need_a_gpu_raise_on_a_cpu(peer: Callable[..., Tensor]) -> None:
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        peer(*pair(), 0.1)


def test_inputs_too_large_for_a_peer_raise() -> None:
    for peer, rows in ((libraries.pytorch_metric_learning, 257), (libraries.pytorch_metric_learning_nt_xent, 129)):
        with pytest.raises(NotImplementedError, match="up to 256 rows, not 25"):
            peer(*pair(rows), 0.1)
    with FakeTensorMode(), pytest.raises(NotImplementedError, match="up to 256 values per row, not 512"):
        contrast.attention(*torch.empty(2, 8, 512, device="cuda"), 0.1)


@pytest.mark.parametrize("shape", [(56, 56), (16, 32), (14, 14)])
def test_blur_pools_raise_for_maps_that_do_not_halve(shape: tuple[int, int]) -> None:
    for peer in (libraries.kornia, libraries.antialiased_cnns):
        with pytest.raises((NotImplementedError, ImportError), match=r"does not halve down to \d x \d|No module"):
            peer(torch.randn(1, 2, *shape), SCALES)


def test_cascade_raises_for_windows_of_unequal_size() -> None:
    with pytest.raises(NotImplementedError, match="14 x 14 is not a multiple of 4 x 4"):
        pooling.cascade(torch.randn(1, 2, 14, 14), SCALES)


def test_only_a_full_benchmark_compiles() -> None:
    with pytest.raises(NotImplementedError, match="only a full benchmark runs it"):
        libraries.cut_cross_entropy(*pair(), 0.1, compile=False)
    eager = {"eager": contrast.dense}
    assert [list(base.compiled(Cpu(size), eager)) for size in ("quick", "full")] == [[], ["compiled eager"]]


def test_16_bit_inputs_are_upcast_on_a_cpu() -> None:
    student, teacher = (x.detach().bfloat16() for x in pair())
    dense = partial(contrast.dense, temperature=0.1)
    call = base.upcast_on_cpu(Cpu(), {"eager": dense}, torch.bfloat16)["eager"]
    assert isinstance(call, WithConversion) and call.conversion == "float32"
    loss = call(student.requires_grad_(), teacher)
    torch.testing.assert_close(loss.double(), loop_info_nce(student, teacher, temperature=0.1), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.dtype == torch.bfloat16 and gradient.any()
    assert base.upcast_on_cpu(Cpu(), {"eager": dense}, torch.float32) == {"eager": dense}


def test_bfloat16_is_kept_if_the_processor_supports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, names in ((True, ["eager in bfloat16"]), (False, [])):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert list(base.native_bfloat16(Cpu(), {"eager": contrast.dense}, torch.bfloat16)) == names
        assert not base.native_bfloat16(Cpu(), {"eager": contrast.dense}, torch.float16)


def test_16_bit_candidates_on_a_gpu() -> None:
    call = contrast.dense
    assert base.bfloat16_on_gpu(Cpu(), call, torch.float32) is call
    assert base.bfloat16_on_gpu(Cuda(), call, torch.float16) is call
    converting = base.bfloat16_on_gpu(Cuda(), call, torch.float32)
    assert isinstance(converting, WithConversion) and converting.conversion == "bfloat16"
    assert converting.convert(torch.ones(2)).dtype == torch.bfloat16


@pytest.mark.parametrize("suite", [lowpass, info_nce, overhead])
def test_all_candidates_of_a_case_agree_with_eager(suite) -> None:
    full, tiny = (suite.cases(Cpu(size), torch.float64) for size in ("quick", "tiny"))
    assert [case.label for case in full] == [case.label for case in tiny]
    ran: set[str] = set()
    for case in tiny:
        inputs = case.inputs()
        upstream = torch.randn_like(case.candidates["eager"](*inputs))
        expected = case.run(case.candidates["eager"], inputs, upstream)
        for name, call in case.candidates.items():
            try:
                results = case.run(call, inputs, upstream)
            except (ImportError, NotImplementedError) as reason:
                assert len(str(reason)) > 10
                continue
            ran.add(name)
            torch.testing.assert_close(results, expected, rtol=1e-7, atol=1e-10, msg=f"{name} in {case.name}")
    assert ran >= {"lfcc", "eager"}
