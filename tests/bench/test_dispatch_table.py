"""The dispatch table made from records whose best rule is known, and the committed table."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from rows import ENVIRONMENT, results, row

import lfcc_kernels as lk
from lfcc_kernels.bench import dispatch, record
from lfcc_kernels.bench.dispatch import best_rule, lines_of
from lfcc_kernels.ops import dispatch as ops

ROOT = Path(lk.__file__).parents[1]


def cases(op: str, times: dict[int, dict[str, float | None]], selected: str = "cpu", **fields) -> list:
    """Rows of one op: the times of lfcc by size and backend (None: failed), in both modes."""
    rows = []
    for (size, by), mode in itertools.product(times.items(), ("fwd", "fwd+bwd")):
        for backend, median in by.items():
            candidate = "lfcc" if backend == selected else f"lfcc, {backend}"
            state = {"status": "failed"} if median is None else {"median_ms": median}
            name = f"{op}-synthetic-{size}x1-{fields.get('dtype', 'float32')}-{mode}"
            rows.append(row(name, candidate, op=op, size=size, backend=backend, **state, **fields))
        rows.append(row(name, "eager", op=op, size=size, median_ms=1e-3, **fields))  # a peer
    return rows


def save(path: Path, made: dict, **environment: str) -> Path:
    for run in made["runs"].values():
        run["environment"] = ENVIRONMENT | environment
    record.save(path, made)
    return path


def rules(path: Path) -> dict[tuple[str, str, str], list[tuple[int | None, str]]]:
    return {key: [(line["up_to"], line["backend"]) for line in lines] for key, lines in lines_of(path).items()}


def test_one_backend_that_is_fastest_everywhere(tmp_path):
    times = {size: {"cpu": 1.0, "eager": 2.0 + size} for size in (1, 10, 100)}
    path = save(tmp_path / "r.json", results(*cases("lowpass", times)))
    (line,) = lines_of(path)["cpu", "lowpass", "float32"]
    assert line == {
        "op": "lowpass",
        "dtype": "float32",
        "up_to": None,
        "backend": "cpu",
        "record": path.as_posix(),
        "cases": 6,
        "worst": 3.0,
    }


def test_crossover_is_the_largest_size_at_which_the_first_is_faster(tmp_path):
    eager = {1: 1.0, 10: 2.0, 100: 9.0, 1000: 90.0}
    times = {size: {"cpu": 3.0, "eager": time} for size, time in eager.items()}
    below, above = lines_of(save(tmp_path / "r.json", results(*cases("lowpass", times))))["cpu", "lowpass", "float32"]
    assert (below["up_to"], below["backend"], below["cases"], below["worst"]) == (10, "eager", 4, 1.5)
    assert (above["up_to"], above["backend"], above["cases"], above["worst"]) == (None, "cpu", 4, 3.0)


@pytest.mark.parametrize(("gain", "rule"), [(1.02, [(None, "cpu")]), (1.04, [(1, "eager"), (None, "cpu")])])
def test_crossover_needs_a_gain_of_three_percent(gain, rule):
    """The gain of the geometric mean over two sizes is the square root of the gain in one."""
    group = [(1, {"cpu": gain**2, "eager": 1.0}), (10, {"cpu": 1.0, "eager": 7.0})]
    assert best_rule("lowpass", group) == rule


def test_mean_is_geometric():
    """Eager is twice as fast in the short case and 1.5 times slower in the long one, at the same size."""
    group = [(1, {"cpu": 0.002, "eager": 0.001}), (1, {"cpu": 100.0, "eager": 150.0})]
    assert best_rule("lowpass", group) == [(None, "eager")]


def test_rule_is_the_best_of_an_exhaustive_search():
    generator = torch.Generator().manual_seed(0)
    sizes, backends = (1, 5, 25, 125), ("cuda", "eager", "triton")
    for _ in range(20):
        draw = torch.rand(len(sizes), len(backends), generator=generator).add(0.1).tolist()
        group = [(size, dict(zip(backends, times, strict=True))) for size, times in zip(sizes, draw, strict=True)]

        def total(cut: int, below: str, above: str, group: list = group) -> float:
            return math.prod(times[below if size <= cut else above] for size, times in group)

        best = min(total(*choice) for choice in itertools.product(sizes, backends, backends))
        unsplit = min(total(0, name, name) for name in backends)
        rule = best_rule("lowpass", group)
        took = total(rule[0][0] or 0, rule[0][1], rule[-1][1])
        assert took == pytest.approx(unsplit if unsplit <= 1.03 ** len(sizes) * best else best)
        assert (len(rule) == 1) == (unsplit <= 1.03 ** len(sizes) * best)


def test_eager_is_not_selected_for_many_pairs():
    sizes = (2**10, 2**18, 2**18 + 1, 2**24)
    group = [(size, {"triton": 2.0, "eager": 1.0}) for size in sizes]
    assert best_rule("info_nce", group) == [(2**18, "eager"), (None, "triton")]
    assert best_rule("lowpass", group) == [(None, "eager")]
    assert best_rule("info_nce", group[2:]) == [(None, "triton")]
    assert best_rule("info_nce", [(size, times | {"triton": math.inf}) for size, times in group]) == []


def test_a_backend_that_failed_is_not_selected_at_that_size(tmp_path):
    times = {1: {"cpu": 1.0, "eager": 0.9}, 10: {"cpu": 1.0, "eager": 0.1}, 100: {"cpu": 1.0, "eager": None}}
    path = save(tmp_path / "r.json", results(*cases("lowpass", times)))
    assert rules(path) == {("cpu", "lowpass", "float32"): [(10, "eager"), (None, "cpu")]}
    assert lines_of(path)["cpu", "lowpass", "float32"][1]["worst"] is None  # only one backend worked


def test_rows_that_give_no_line(tmp_path):
    """A single backend, float64, the kept heap, and cases of more than one op."""
    pair = {1: {"cpu": 1.0, "eager": 2.0}}
    rows = [
        *cases("lowpass", {1: {"cpu": 1.0}}),
        *cases("info_nce", pair, dtype="float64"),
        *cases("info_nce", pair, run="kept"),
        row("lfcc-average-8x4x3-float32-fwd", "lfcc"),
    ]
    path = save(tmp_path / "r.json", results(*rows))
    assert lines_of(path) == {}
    with pytest.raises(ValueError, match=r"r\.json has no op measured on two backends"):
        dispatch.main([path], tmp_path / "table.json")
    assert not (tmp_path / "table.json").exists()


def test_tiny_cases_raise(tmp_path):
    path = save(tmp_path / "r.json", results(*cases("lowpass", {1: {"cpu": 1.0, "eager": 2.0}}), size="tiny"))
    with pytest.raises(ValueError, match="tiny"):
        dispatch.main([path], tmp_path / "table.json")


def test_key_of_a_gpu_is_its_capability(tmp_path):
    rows = cases(
        "info_nce", {2**20: {"triton": 2.0, "cuda": 1.0, "eager": 0.1}}, "triton", run="cuda", dtype="bfloat16"
    )
    path = save(tmp_path / "r.json", results(*rows), capability="9.0")
    assert rules(path) == {("sm_90", "info_nce", "bfloat16"): [(None, "cuda")]}


def test_a_record_replaces_only_what_it_measured(tmp_path, capsys):
    def measured(name: str, op: str, cpu: float) -> Path:
        return save(
            tmp_path / name, results(*cases(op, {1: {"cpu": cpu, "eager": 2.0}, 9: {"cpu": 1.0, "eager": 2.0}}))
        )

    table = tmp_path / "table.json"
    gpu = {
        "op": "lowpass",
        "dtype": "float32",
        "up_to": None,
        "backend": "cuda",
        "record": None,
        "cases": 1,
        "worst": 1,
    }
    table.write_text(json.dumps({"sm_90": [gpu]}))
    first = [measured("a.json", "lowpass", 1.0), measured("b.json", "info_nce", 1.0)]
    dispatch.main(first, table)
    assert "cpu lowpass float32: cpu (4 cases, at least 2.0x as fast as the next, " in capsys.readouterr().out
    dispatch.main([measured("c.json", "lowpass", 4.0)], table)
    printed = capsys.readouterr().out
    assert (
        "up to size 1 eager (2 cases, at least 2.0x as fast as the next, " in printed
        and f"before: cpu (4 cases, at least 2.0x as fast as the next, {first[0]})" in printed
    )
    dispatch.main([tmp_path / "c.json"], table)
    assert "unchanged" in capsys.readouterr().out
    written = json.loads(table.read_text())
    assert written["sm_90"] == [gpu]
    assert [(line["op"], line["up_to"], line["backend"], Path(line["record"]).name) for line in written["cpu"]] == [
        ("info_nce", None, "cpu", "b.json"),
        ("lowpass", 1, "eager", "c.json"),
        ("lowpass", None, "cpu", "c.json"),
    ]


def test_auto_reads_the_written_table(tmp_path, monkeypatch):
    times = {16: {"cpu": 3.0, "eager": 1.0}, 64: {"cpu": 1.0, "eager": 3.0}}
    path = save(tmp_path / "r.json", results(*cases("info_nce", times)))
    monkeypatch.setattr(ops, "TABLE", tmp_path / "table.json")
    dispatch.main([path], tmp_path / "table.json")
    ops._cached_lines.cache_clear()
    lines = ops._cached_lines("info_nce", torch.device("cpu"), torch.float32)
    ops._cached_lines.cache_clear()
    assert [(bound, backends[0]) for bound, backends in lines] == [(16, "eager"), (None, "cpu")]


def test_the_committed_table():
    """Every line names its record, bounds increase up to None, and eager is not selected for many pairs."""
    table = ops.table()
    assert all(name == "cpu" or name.startswith("sm_") for name in table)
    for name, lines in table.items():
        backends = {"cpu", "eager"} if name == "cpu" else {"triton", "cuda", "eager"}
        groups = itertools.groupby(lines, key=lambda line: (line["op"], line["dtype"]))
        groups = [(key, list(group)) for key, group in groups]
        assert len({key for key, _ in groups}) == len(groups)
        for (op, dtype), group in groups:
            assert op in ("lowpass", "info_nce") and dtype in ("float32", "bfloat16", "float16")
            *bounds, last = [line["up_to"] for line in group]
            assert last is None and bounds == sorted(bounds) and len(bounds) <= 1
            for line in group:
                assert set(line) == {"op", "dtype", "up_to", "backend", "record", "cases", "worst"}
                assert line["backend"] in backends and line["cases"] > 0
                assert line["record"] is None or (ROOT / line["record"]).is_file()
                if (op, line["backend"]) == ("info_nce", "eager"):
                    assert line["up_to"] is not None and line["up_to"] <= 2**18
