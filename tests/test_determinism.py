"""The kernels are deterministic, the compiled CPU kernels also for any number of threads."""

import pytest
import torch

import lfcc_kernels as lk
from lfcc_kernels.filters import Learnable


def lowpass_results(channels_last: bool) -> list[torch.Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(5, 70, 14, 11, generator=generator).to(memory_format=layout).requires_grad_()
    filters = [matrix.detach().requires_grad_() for matrix in Learnable((1, 2, 4))(14, 11)]
    y = lk.lowpass(x, (1, 2, 4), row_filters=filters[0], col_filters=filters[1])
    upstream = torch.randn(y.shape, generator=generator)
    return [y, *torch.autograd.grad(y, [x, *filters], upstream)]


def info_nce_results(direction: str, rows: int) -> list[torch.Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    student, teacher = (torch.randn(rows, 48, generator=generator).requires_grad_() for _ in range(2))
    temperature = torch.tensor(0.1, requires_grad=True)
    losses = lk.info_nce(student, teacher, temperature=temperature, direction=direction, reduction="none")
    upstream = torch.randn(rows, generator=generator)
    return [losses, *torch.autograd.grad(losses, [student, teacher, temperature], upstream)]


# The cases that are fast in Triton's interpreter; a GPU runs all.
FAST = ["lowpass, nchw", "lowpass, nhwc", "one way, few rows"]
CASES = {
    "lowpass, nchw": lambda: lowpass_results(channels_last=False),
    "lowpass, nhwc": lambda: lowpass_results(channels_last=True),
    "one way": lambda: info_nce_results("student_to_teacher", 700),
    "one way, few rows": lambda: info_nce_results("student_to_teacher", 65),
    "symmetric": lambda: info_nce_results("symmetric", 700),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("counts", [(2, 2), (1, 2), (2, 3)], ids=str)
def test_same_bits_for_any_number_of_threads(compiled_kernels: str, case: str, counts: tuple[int, int]) -> None:
    results = []
    for count in counts:
        torch.set_num_threads(count)
        results.append(CASES[case]())
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("case", CASES)
def test_same_bits_twice(kernels: str, case: str) -> None:
    if kernels == "triton" and not torch.cuda.is_available() and case not in FAST:
        pytest.skip("too slow in Triton's interpreter")
    for first, second in zip(CASES[case](), CASES[case](), strict=True):
        assert torch.equal(first, second)
