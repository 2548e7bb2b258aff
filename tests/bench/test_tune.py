"""`lfcc bench --tune` without a GPU: candidates, selection, the written table, and that tiles reach the kernels."""

import copy
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lfcc_kernels.backends import triton
from lfcc_kernels.bench.tune import command as tuning
from lfcc_kernels.cli import main

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from lfcc_kernels.backends.triton import runtime, tiles
from lfcc_kernels.bench.tune import launches, search
from lfcc_kernels.bench.tune.cases import Case, Crossover, Sizes, kernel_cases

pytestmark = pytest.mark.skipif(bool(triton.missing()), reason=triton.missing() or "there is a GPU")

LINES = [
    (kernel, shape_class, line)
    for table in (json.loads(path.read_text()) for path in tiles.TABLES.glob("*.json"))
    for kernel, lines in table["kernels"].items()
    for shape_class, line in lines.items()
]
TINY = Sizes(
    maps=(("nchw", (1, 3, 5, 4)), ("channels_last", (1, 18, 4, 5))),
    fused=((20, 16),),
    chunks=((20, 16),),
    foreach=(10,),
    foreach_channels=(3,),
    crossover_rows=(8, 24),
    crossover_widths=(16, 32),
    crossover_foreach=(8, 16),
)


@pytest.fixture
def table() -> Iterator[dict[str, Any]]:
    """The table that launchers read here, restored afterwards."""
    live = tiles.table(runtime.device_props(torch.device(triton.DEVICE)).capability)
    before = copy.deepcopy(live)
    yield live
    live.clear()
    live.update(before)


@pytest.mark.parametrize("line", {str(line): line for *_, line in LINES}.values(), ids=str)
def test_candidates(line: dict[str, int]) -> None:
    found = search.candidates(line)
    assert found[0] == line and 3 <= len(found) <= search.MOST_CANDIDATES
    assert len({tuple(one.items()) for one in found}) == len(found)
    for one in found:
        assert one.keys() == line.keys()
        for name, value in one.items():
            if name.startswith("BLOCK_"):
                assert value.bit_count() == 1 and min(line[name], 16) <= value <= 4 * line[name]
            elif value != line[name]:
                assert value in {"num_warps": search.WARPS, "num_stages": search.STAGES}[name]
    varied = {name for one in found for name in one if one[name] != line[name]}
    assert varied == line.keys()


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0], 0),
        ([1.0, 0.99, 1.5], 0),  # within the margin
        ([1.0, 0.97, 0.95, 0.96], 2),
        ([float("inf"), 5.0, 4.0], 2),  # the incumbent does not run
        ([1.0, float("inf")], 0),
        ([float("inf"), float("inf")], 0),
    ],
)
def test_best(scores: list[float], expected: int) -> None:
    assert search.best(scores) == expected


class World:
    """A table of one synthetic kernel. The cost of a call depends on the entries of the table during the call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str, int], float]) -> None:
        """`seconds(case, value)` is the cost of a case for the block, chunk or algorithm in the table."""
        self.table = {
            "architecture": 90,
            "source": "before",
            "chunk_bytes": 16 << 20,
            "way": "one",
            "kernels": {"kernel": {"2": {"BLOCK_K": 64, "num_warps": 4}, "8": {"BLOCK_K": 16}}},
        }
        self.seconds, self.cost = seconds, 0.0
        kernel = [self.case(name, lambda: self.table["kernels"]["kernel"]["2"]["BLOCK_K"]) for name in "ab"]
        chunks = [self.case("chunks", lambda: self.table["chunk_bytes"])]
        self.places = {rows: self.case(str(rows), lambda: self.table["way"]) for rows in (64, 512)}
        way = Crossover(("way",), ("two", "one"), self.places, ["one", "two", 256], self.takes_two)
        monkeypatch.setattr(search, "kernel_cases", lambda sizes: kernel)
        monkeypatch.setattr(search, "chunk_cases", lambda sizes: chunks)
        monkeypatch.setattr(search, "crossovers", lambda sizes: [way])
        self.said: list[str] = []
        self.tuner = search.Tuner(self.table, Sizes(), self.clock, self.said.append)

    def case(self, name: str, look: Callable[[], Any]) -> Case:
        def triton() -> list[torch.Tensor]:
            self.cost = self.seconds(name, look())
            return [torch.ones(3)]

        return Case(name, tuple, triton, lambda: [torch.ones(3)], 1e-3)

    @staticmethod
    def takes_two(rule: Any, rows: int) -> bool:
        return rule == "two" or (rule != "one" and rows >= rule)

    def clock(self, call: Callable[[], object]) -> float:
        call()
        return self.cost


def seconds(name: str, value: Any) -> float:
    """Case a is fastest at 128, b at 32; the geometric mean is least at 128. Chunks are equal, ways cross at 256."""
    if name in "ab":
        return {"a": {32: 4.0, 64: 4.0, 128: 1.0}, "b": {32: 1.0, 64: 2.0, 128: 3.0}}[name][value]
    if name == "chunks":
        return 1.0
    return 1.0 if (value == "two") == (int(name) >= 256) else 2.0


def test_search_finds_the_best_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, seconds)
    before = copy.deepcopy(world.table)
    found, kept = world.tuner.tune()
    assert found["kernels"]["kernel"] == {"2": {"BLOCK_K": 128, "num_warps": 4}, "8": {"BLOCK_K": 16}}
    assert found["chunk_bytes"] == before["chunk_bytes"] and found["way"] == 256
    assert kept == ["kernel 8"]
    assert world.table == before
    assert any("1.63 times as fast" in line for line in world.said)


def failing(kind: type[BaseException], block: int) -> Callable[[str, Any], float]:
    def fail(name: str, value: Any) -> float:
        if name in "ab" and value >= block:
            raise kind("it does")
        return seconds(name, value)

    return fail


def test_candidates_that_fail_are_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, failing(RuntimeError, 128))
    found, kept = world.tuner.tune()
    assert found["kernels"]["kernel"]["2"]["BLOCK_K"] == 32 and kept == ["kernel 8"]
    assert any("4 x RuntimeError" in line for line in world.said)


def test_entries_that_cannot_be_measured_are_unchanged_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, failing(RuntimeError, 0))
    found, kept = world.tuner.tune()
    assert found["kernels"] == world.table["kernels"] and found["way"] == 256
    assert kept == ["kernel 2", "kernel 8"]


def test_wrong_results_are_rejected() -> None:
    def call() -> list[torch.Tensor]:
        return [torch.tensor([1.0, 2.0])]

    assert search._check(call, [torch.tensor([1.001, 2.001])], 1e-3, None) == 0
    for expected in ([1.01, 2.0], [1.0, torch.nan], [torch.inf, 2.0]):
        with pytest.raises(search.Rejected, match="differs"):
            search._check(call, [torch.tensor(expected)], 1e-3, None)


def test_more_spills_than_the_incumbent_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        def run(self, spills: int, warmup: bool = False) -> Any:
            return type("Compiled", (), {"n_spills": spills})

    monkeypatch.setattr(launches, "INTERPRET", False)
    monkeypatch.setattr(launches, "JITFunction", Kernel)

    def call() -> list[torch.Tensor]:
        Kernel().run(3)
        Kernel().run(5)
        return [torch.ones(1)]

    assert search._check(call, call(), 1e-3, None) == 8
    assert search._check(call, call(), 1e-3, 8) == 8
    with pytest.raises(search.Rejected, match="spills"):
        search._check(call, call(), 1e-3, 7)


def test_table_is_written_with_its_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world, path = World(monkeypatch, seconds), tmp_path / "sm_90.json"
    tuning.write_table(path, 89, world.tuner.tune, "measured on a GPU")
    written = json.loads(path.read_text())
    assert written.keys() == world.table.keys()
    assert written["architecture"] == 89 and written["source"] == "measured on a GPU; not measured: kernel 8"
    assert written["kernels"]["kernel"]["2"]["BLOCK_K"] == 128
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("kind", "when"), [(KeyboardInterrupt, "clock"), (KeyboardInterrupt, "replace"), (OSError, "replace")]
)
def test_old_table_survives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture, kind: type[BaseException], when: str
) -> None:
    def stop(*_: object) -> None:
        raise kind("stop")

    world, path = World(monkeypatch, seconds), tmp_path / "sm_90.json"
    path.write_text("old")
    before = copy.deepcopy(world.table)
    monkeypatch.setattr(world.tuner if when == "clock" else tuning.os, when, stop)
    with pytest.raises(kind):
        tuning.write_table(path, 90, world.tuner.tune, "")
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    assert world.table == before
    assert (f"interrupted; {path} is unchanged" in capsys.readouterr().err) == (kind is KeyboardInterrupt)


def test_nothing_measured_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(monkeypatch, failing(RuntimeError, 0))
    with pytest.raises(ValueError, match="no kernel could be measured"):
        tuning.write_table(tmp_path / "sm_90.json", 90, world.tuner.tune, "")
    with pytest.raises(ValueError, match="-o FILE"):
        tuning.write_table(tmp_path / "none" / "sm_90.json", 90, world.tuner.tune, "")
    assert not [*tmp_path.iterdir()]


def test_command_raises_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(tuning, "INTERPRET", True)
    assert main(["bench", "--tune"]) == 1
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err
    monkeypatch.setattr(tuning, "INTERPRET", False)
    monkeypatch.setattr(tuning, "missing", lambda: "torch finds no NVIDIA GPU; try another")
    assert main(["bench", "--tune", "-o", "table.json"]) == 1
    error = capsys.readouterr().err
    assert "needs an NVIDIA GPU and Triton, but torch finds no NVIDIA GPU\n" in error and error.count("\n") == 1


def test_cases_look_up_every_line_but_those_of_float64(monkeypatch: pytest.MonkeyPatch, table: dict[str, Any]) -> None:
    """A new kernel or shape class in a table needs a case that runs it."""
    monkeypatch.setattr(runtime, "compute_dtype", lambda dtype: dtype)  # classes as on a GPU; nothing is launched here
    readers = search.Tuner(table, TINY, float, print)._readers()
    wanted = {(kernel, shape_class) for kernel, shape_class, _ in LINES if shape_class != "8"}
    assert wanted == readers.keys()


@pytest.mark.parametrize(
    "case", kernel_cases(TINY)[::2], ids=lambda case: case.name
)  # every op in one of the two dtypes
def test_tiles_of_the_table_reach_the_kernels(table: dict[str, Any], case: Case) -> None:
    """Blocks of both sizes are launched, and the results agree with eager."""
    seen: list[dict[str, int]] = []

    def record(launch: Callable, *arguments: Any, **options: Any) -> Any:
        seen.append({name: value for name, value in options.items() if name.startswith("BLOCK_")})
        return launch(*arguments, **options)

    def run(block: int) -> list[dict[str, int]]:
        for line in (line for lines in table["kernels"].values() for line in lines.values()):
            line |= {name: block for name in line if name.startswith("BLOCK_")}
        seen.clear()
        with search.changed(table, case.settings), launches._launching(record):
            search._check(functools.partial(case.triton, *inputs), expected, case.tolerance, None)
        return [*seen]

    inputs = case.inputs()
    expected = case.eager(*inputs)
    case.triton(*inputs)  # launchers may cache in their first call
    large, small = run(32), run(16)
    blocks = [(many[name], few[name]) for many, few in zip(large, small, strict=True) for name in many]
    assert {(one, other) for one, other in blocks if one != other} == {(32, 16)}


def test_crossovers_select_the_algorithm(table: dict[str, Any]) -> None:
    """Each algorithm of a crossover launches kernels that the other does not."""
    for crossover in search.crossovers(TINY):
        *path, key = crossover.path
        holder = functools.reduce(dict.__getitem__, path, table)
        case = next(iter(crossover.cases.values()))
        inputs, ways = case.inputs(), []
        for way in crossover.ways:
            seen: set[tuple[str, str]] = set()
            kernels = {name: search._Recorder(lines, name, seen) for name, lines in table["kernels"].items()}
            with search.changed(holder, {key: way}), search.changed(table, {"kernels": kernels}):
                case.triton(*inputs)
            ways.append(seen)
        assert ways[0] - ways[1]
