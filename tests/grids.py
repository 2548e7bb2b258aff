"""Grids of test cases: a covering array in place of the full product, named cases, and a random slice of the rest.

    @grid(shape=SHAPES, dtype=DTYPES, layout=LAYOUTS, named=[("odd channels", torch.bfloat16, "channels_last")])
    def test_lowpass(kernels, shape, dtype, layout): ...

Each axis is a list of values, or a dictionary from the labels of values to the values. By default a test runs on enough
cases for every value of an axis to meet every value of every other axis, on the named cases, which are tuples of labels
in the order of the axes, and on a slice of about 5 % of what is left (of a large product, on a quarter more cases). The
slice is drawn with `--slice-seed`, by default the commit, so that in time all of the product is run. `--full` runs the
product. `conftest.py` expands grids.
"""

import math
import random
import subprocess
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

Case = tuple[Hashable, ...]
SLICE, MOST = 0.05, 0.25  # of the rest of the product, and at most of the chosen cases


def grid(*, named: Sequence[Case] = (), **axes: Sequence[Any] | Mapping[Hashable, Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by the cases of a grid."""
    return pytest.mark.grid(named=named, axes={name: _labelled(values) for name, values in axes.items()})


def expand(metafunc: pytest.Metafunc) -> None:
    """Parametrizes a test that has a grid; for `pytest_generate_tests`."""
    options = metafunc.config.option
    for marker in metafunc.definition.iter_markers("grid"):
        axes, named = marker.kwargs["axes"], marker.kwargs["named"]
        labels = [list(axis) for axis in axes.values()]
        seed = f"{options.slice_seed} {metafunc.function.__module__}.{metafunc.function.__name__}"
        chosen = list(product(*labels)) if options.full else cases(labels, named, seed)
        values = [[axis[label] for axis, label in zip(axes.values(), case, strict=True)] for case in chosen]
        ids = ["-".join(map(_id, case)) for case in chosen]
        metafunc.parametrize(list(axes), values, ids=ids)


def cases(axes: Sequence[Sequence[Hashable]], named: Sequence[Case], seed: str) -> list[Case]:
    """The covering array, the named cases and a slice of the rest, in the order of the product."""
    everything = list(product(*axes))
    if unknown := [case for case in named if case not in everything]:
        raise ValueError(f"named cases {unknown} are not in the product of the axes")
    chosen = {*pairwise(*axes), *named}
    rest = [case for case in everything if case not in chosen]
    size = min(round(SLICE * len(rest)), math.ceil(MOST * len(chosen)))
    chosen.update(random.Random(seed).sample(rest, size))
    return [case for case in everything if case in chosen]


def pairwise(*axes: Sequence[Hashable]) -> list[Case]:
    """Cases in which every value of every axis meets every value of every other axis, chosen greedily."""
    if len(axes) < 2:
        return list(product(*axes))
    values = [[(axis, value) for value in axes[axis]] for axis in range(len(axes))]
    open_pairs = dict.fromkeys(frozenset(pair) for two in combinations(values, 2) for pair in product(*two))
    chosen, uses = [], Counter()
    while open_pairs:
        case = dict(sorted(next(iter(open_pairs)), key=lambda place: place[0]))
        for axis in sorted(set(range(len(axes))) - case.keys(), key=lambda axis: -len(axes[axis])):

            def gain(value: Hashable, axis: int = axis, case: dict = case) -> tuple[int, int]:
                """How many open pairs the value closes; of equals the one that was used least."""
                closes = sum(frozenset({(axis, value), place}) in open_pairs for place in case.items())
                return closes, -uses[axis, value]

            case[axis] = max(axes[axis], key=gain)
        uses.update(case.items())
        for pair in combinations(case.items(), 2):
            open_pairs.pop(frozenset(pair), None)
        chosen.append(tuple(case[axis] for axis in range(len(axes))))
    return chosen


def commit() -> str:
    """The commit of the tests, or 0 without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "0"


def _labelled(values: Sequence[Any] | Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    return dict(values) if isinstance(values, Mapping) else {value: value for value in values}


def _id(label: Hashable) -> str:
    return str(label).removeprefix("torch.") if isinstance(label, torch.dtype) else str(label)
