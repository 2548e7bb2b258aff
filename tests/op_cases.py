"""Small cases of every op: through the public functions, and as direct calls of `torch.ops.lfcc`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, randn

import lfcc_kernels as lk
from lfcc_kernels.backends.schemas import BACKENDS

DIRECTIONS = ["student_to_teacher", "teacher_to_student", "symmetric"]


def functions(
    dtype: torch.dtype = torch.float64, batch: int = 4
) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Small cases that together run every code path. All inputs of a case require gradients."""
    x, tokens = randn(batch, 3, 7, 5, dtype=dtype), randn(batch, 36, 3, dtype=dtype)
    channels_last = x.to(memory_format=torch.channels_last)
    filters = [randn(3, 7, dtype=dtype), randn(3, 5, dtype=dtype)]
    pair = [randn(batch, 6, dtype=dtype), randn(batch + 3, 6, dtype=dtype)]
    temperature = torch.tensor(0.7, dtype=dtype)
    ids = {"student_ids": torch.arange(batch) // 2, "teacher_ids": torch.arange(batch + 3) // 2}

    def filtered(x: Tensor, rows: Tensor, cols: Tensor, **tokens: Any) -> Tensor:
        return lk.lowpass(x, (1, 2), row_filters=rows, col_filters=cols, **tokens)

    def contrast(direction: str, **options: Any) -> Callable[..., Tensor]:
        return lambda student, teacher, temperature: lk.info_nce(
            student, teacher, temperature=temperature, direction=direction, positive_offset=2, **options
        )

    cases = {
        "average": (lambda x: lk.lowpass(x, (1, 2)), [x]),
        "average, channels_last": (lambda x: lk.lowpass(x, (1, 2)), [channels_last]),
        "filters": (filtered, [x, *filters]),
        "filters, channels_last": (filtered, [channels_last, *filters]),
        "average, tokens": (lambda x: lk.lowpass(x, (1, 2), grid=(7, 5), prefix_tokens=1), [tokens]),
        "filters, tokens": (
            lambda x, rows, cols: filtered(x, rows, cols, grid=(7, 5), prefix_tokens=1),
            [tokens, *filters],
        ),
    }
    for direction in DIRECTIONS:
        cases[direction] = (contrast(direction), [*pair, temperature])
        cases[f"{direction}, ids, none"] = (contrast(direction, reduction="none", **ids), [*pair, temperature])
        cases[f"{direction}, rows as they are"] = (contrast(direction, normalize=False), [*pair, temperature])
    return {name: (f, [x.detach().requires_grad_() for x in inputs]) for name, (f, inputs) in cases.items()}


FUNCTIONS = list(functions())


def _filters() -> list[Tensor]:
    return [randn(3, 7, requires_grad=True), randn(3, 5, requires_grad=True)]


def _pair(keys: int = 6) -> list[Tensor]:
    return [randn(4, 8, requires_grad=True), randn(keys, 8, requires_grad=True)]


def _rows(*extra: Any, keys: int = 6, ids: bool = False, offset: int = 1) -> tuple[Any, ...]:
    """The first six arguments of the info_nce ops, then `extra`."""
    student_ids, teacher_ids = (torch.arange(4) // 2, torch.arange(keys) // 2) if ids else (None, None)
    return *_pair(keys), torch.tensor(0.1, requires_grad=True), student_ids, teacher_ids, offset, *extra


def constants(*arguments: Any) -> tuple[Any, ...]:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)


def _map(**options: Any) -> Tensor:
    return randn(2, 3, 7, 5, requires_grad=True, **options)


def _lse() -> Tensor:
    """Log-sum-exps as a forward pass could return them."""
    return torch.full((4,), 9.0)


def _foreach(with_ids: bool = False) -> tuple[Any, ...]:
    """Two pairs; the rows of the second are slices of wider rows."""
    students = [randn(4, 8, requires_grad=True), randn(4, 10)[:, :5].requires_grad_()]
    teachers = [randn(6, 8), randn(6, 10)[:, :5]]
    ids = (torch.arange(4) // 2, torch.arange(6) // 2) if with_ids else (None, None)
    return students, teachers, torch.tensor(0.1, requires_grad=True), *ids, 1, True


def _maps() -> list[Tensor]:
    """A contiguous map, a channels_last map, and tokens."""
    channels_last = randn(2, 9, 8, 3).permute(0, 3, 1, 2).requires_grad_()
    return [_map(), channels_last, randn(2, 36, 3, requires_grad=True)]


def _all_filters() -> tuple[list[Tensor], list[Tensor]]:
    heights, widths = (7, 9, 7), (5, 8, 5)
    return tuple([randn(3, size, requires_grad=True) for size in sizes] for sizes in (heights, widths))


_GRIDS = [0, 0, 0, 0, 7, 5]  # of `_maps`; the third has one prefix token

CALLS: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "average": ("lowpass", lambda: (_map(), [1, 2], None, None, [], 0)),
    "average, channels_last": (
        "lowpass",
        lambda: (randn(2, 7, 5, 3).permute(0, 3, 1, 2).requires_grad_(), [1, 2], None, None, [], 0),
    ),
    "average, bfloat16": ("lowpass", lambda: (_map(dtype=torch.bfloat16), [1, 2], None, None, [], 0)),
    "filters": ("lowpass", lambda: (_map(), [1, 2], *_filters(), [], 0)),
    "tokens": ("lowpass", lambda: (randn(2, 36, 3, requires_grad=True), [1, 2], *_filters(), [7, 5], 1)),
    "gradient of a map": (
        "lowpass_input_grad",
        lambda: (randn(2, 5, 3), [2, 3, 7, 5], False, [1, 2], *constants(*_filters()), [], 0),
    ),
    "gradient of a channels_last map": (
        "lowpass_input_grad", lambda: (randn(2, 5, 3), [2, 3, 7, 5], True, [1, 2], None, None, [], 0),
    ),
    "gradient of tokens": (
        "lowpass_input_grad", lambda: (randn(2, 5, 3), [2, 36, 3], False, [1, 2], None, None, [7, 5], 1),
    ),
    "gradient of filters": (
        "lowpass_filter_grad",
        lambda: (randn(2, 5, 3), *constants(_map(), [1, 2], *_filters(), [], 0)),
    ),
    "rows": ("info_nce", lambda: _rows(False, True, False)),
    "rows as they are": ("info_nce", lambda: _rows(False, False, True)),
    "symmetric": ("info_nce", lambda: _rows(True, True, True)),
    "symmetric with ids": ("info_nce", lambda: _rows(True, True, False, ids=True)),
    "one pass": ("info_nce_one_pass", lambda: _rows(True, True)),
    "one pass with ids": ("info_nce_one_pass", lambda: _rows(True, False, ids=True)),
    "gradient of rows": (
        "info_nce_grad",
        lambda: (randn(4), *constants(*_rows(False, True)), _lse(), randn(0), False),
    ),
    "gradient of both, of the teacher": (
        "info_nce_grad",
        lambda: (randn(4), *constants(*_rows(True, True)), _lse(), _lse(), True),
    ),
    "many maps": ("lowpass_foreach", lambda: (_maps(), [1, 2], [], [], _GRIDS, [0, 0, 1])),
    "many maps with filters": ("lowpass_foreach", lambda: (_maps(), [1, 2], *_all_filters(), _GRIDS, [0, 0, 1])),
    "gradient of many maps": (
        "lowpass_foreach_input_grad",
        lambda: (
            [randn(2, 5, 3) for _ in range(3)], [2, 3, 7, 5, 2, 3, 9, 8, 2, 36, 3], [0, 1, 0], [1, 2],
            *([x.detach() for x in side] for side in _all_filters()), _GRIDS, [0, 0, 1],
        ),
    ),
    "many pairs": ("info_nce_foreach", _foreach),
    "many pairs with ids": ("info_nce_foreach", lambda: _foreach(with_ids=True)),
}  # fmt: skip


def skip_unless_implemented(name: str, backend: str) -> None:
    """Skips the call of an op that this backend does not implement."""
    if backend not in BACKENDS[name]:
        pytest.skip(f"implemented by {', '.join(BACKENDS[name])} only")
