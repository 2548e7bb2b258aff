"""Grids of tests: the covering array covers all pairs, and the slice depends on the seed only."""

import math
from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch
from grids import cases, expand, grid, pairwise

AXES = {
    "one axis": [range(5)],
    "two axes": [range(4), range(3)],
    "an axis of one value": [range(4), "a", range(3)],
    "shapes, types, layouts, filters": [range(17), range(4), "cl", "ad"],
    "many axes of two values": ["ab"] * 10,
    "equal values on two axes": [(1, 2, 3), (1, 2, 3), (3, 2, 1)],
}


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_every_pair_of_values_meets(axes: list) -> None:
    chosen = pairwise(*axes)
    assert set(chosen) <= set(product(*axes)) and len(set(chosen)) == len(chosen)
    for a, b in combinations(range(len(axes)), 2):
        assert {(case[a], case[b]) for case in chosen} == set(product(axes[a], axes[b]))
    assert {case[0] for case in chosen} == set(axes[0])


@pytest.mark.parametrize("axes, most", [(AXES["shapes, types, layouts, filters"], 68), (["ab"] * 10, 10)])
def test_few_cases_suffice(axes: list, most: int) -> None:
    assert len(pairwise(*axes)) <= most


def test_chosen_are_the_covering_array_the_named_cases_and_a_slice() -> None:
    axes = [range(10), range(10), range(10)]
    covering = set(pairwise(*axes))
    named = [case for case in product(*axes) if case not in covering][:3]
    chosen = cases(axes, named, "seed")
    assert chosen == sorted(set(chosen)) == cases(axes, named, "seed")
    assert covering | set(named) <= set(chosen)
    few = len(covering) + 3
    assert few < 200 and len(chosen) == few + min(round(0.05 * (1000 - few)), math.ceil(0.25 * few))
    assert chosen != cases(axes, named, "another seed")


def test_a_named_case_is_of_the_product() -> None:
    with pytest.raises(ValueError, match=r"\(0, 7\)"):
        cases([range(3), range(3)], [(0, 7)], "seed")


@pytest.mark.parametrize("full", [False, True])
def test_a_test_gets_labels_as_ids_and_values_as_arguments(full: bool) -> None:
    mark = grid(x=range(20), y={"one": 1, "two": 2}, z=[torch.float32, 4], named=[(7, "two", 4)])

    def test() -> None: ...

    given = []
    expand(
        SimpleNamespace(
            config=SimpleNamespace(option=SimpleNamespace(full=full, slice_seed="seed")),
            definition=SimpleNamespace(iter_markers=lambda name: [mark.mark]),
            function=test,
            parametrize=lambda names, values, ids: given.extend([names, *zip(ids, values, strict=True)]),
        )
    )
    names, *chosen = given
    assert names == ["x", "y", "z"] and ("7-two-4", [7, 2, 4]) in chosen
    assert len(chosen) == (80 if full else 42) and "0-one-float32" in dict(chosen)
