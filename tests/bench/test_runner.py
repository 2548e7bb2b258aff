"""The harness and the runner on synthetic cases: status of candidates, interruptions, processes that end."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lfcc_kernels.bench import cases as suites
from lfcc_kernels.bench import record, runner
from lfcc_kernels.bench.cases import Case, Step, WithConversion
from lfcc_kernels.bench.harness import Benchmark
from lfcc_kernels.bench.machine import Cpu, Machine
from lfcc_kernels.bench.record import BASELINE, NOT_REACHED, Request, Row

REQUEST = Request(["lowpass"], "cpu", "tiny")
SIDE = 64


def double(x: Tensor) -> Tensor:
    return 2 * x


def not_installed(x: Tensor) -> Tensor:
    raise ImportError("no package of that name")


def not_here(x: Tensor) -> Tensor:
    raise NotImplementedError("it needs an NVIDIA GPU")


def broken(x: Tensor) -> Tensor:
    raise ZeroDivisionError("division by zero")


def inputs() -> tuple[Tensor]:
    return (torch.randn(SIDE, SIDE, requires_grad=True),)


def case(label: str = "made-up", **fields) -> Case:
    candidates = {"lfcc": double, "eager": lambda x: x + x}
    made = Case(
        "lowpass", label, (SIDE, SIDE), "fwd+bwd", inputs, candidates, (Step(bytes=4 * SIDE * SIDE),), "X bytes"
    )
    return replace(made, **fields)


@pytest.fixture(autouse=True)
def three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "rounds", lambda self, seconds: 3)


def rows_of(made: Case) -> dict[str, Row]:
    benchmark = Benchmark(made, REQUEST, Cpu("tiny"))
    benchmark.run()
    return {row.candidate: row for row in benchmark.rows(benchmark.peak_memory())}


def test_status_of_candidates() -> None:
    others = {
        "off": lambda x: 2.01 * x,
        "wrong gradient": lambda x: 2 * x.detach() + 0 * x,
        "absent": not_installed,
        "elsewhere": not_here,
        "broken": broken,
    }
    rows = rows_of(case(candidates=case().candidates | others))
    assert {name: row.status for name, row in rows.items()} == {
        "lfcc": "ok", "eager": "ok", "off": "wrong", "wrong gradient": "wrong", "absent": "skipped",
        "elsewhere": "skipped", "broken": "failed",
    }  # fmt: skip
    assert rows["off"].error == pytest.approx(0.005, rel=1e-3)
    assert rows["lfcc"].error == 0 and rows["lfcc"].reference == "float64"
    assert "an NVIDIA GPU" in rows["elsewhere"].note and "division by zero" in rows["broken"].note
    for row in rows.values():
        assert (row.median_ms is not None) == (row.rounds == 3) == (row.status == "ok")
    timed = rows["lfcc"]
    assert 0 < timed.q20_ms <= timed.median_ms <= timed.q80_ms
    assert timed.speedup_over_eager == pytest.approx(rows["eager"].median_ms / timed.median_ms)


def test_floor_uses_the_ceilings_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cpu, "copy_gbps", lambda self: 2.0)
    monkeypatch.setattr(Cpu, "gemm_gflops", lambda self, dtype: 4.0)
    monkeypatch.setattr(Cpu, "seconds", lambda self, call, *_: (call(), 0.5)[1])
    steps = (Step(bytes=int(1e8), flops=int(1e8)), Step(flops=int(4e8)))  # 0.05 s and 0.025 s; 0.1 s
    assert rows_of(case(steps=steps))["lfcc"].fraction_of_floor == pytest.approx((0.05 + 0.1) / 0.5)


def test_conversions_are_timed_separately() -> None:
    seen: list[torch.dtype] = []

    def upcast(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return 2 * x

    half = case(
        candidates=case().candidates | {"upcast": WithConversion(upcast, lambda x: x.float(), "float32")},
        inputs=lambda: (torch.randn(SIDE, SIDE).bfloat16().requires_grad_(),),
        dtype=torch.bfloat16,
    )
    rows = rows_of(half)
    assert rows["upcast"].status == "ok" and set(seen) == {torch.float32}
    assert rows["upcast"].conversion == "float32" and rows["upcast"].conversion_ms > 0
    assert rows["lfcc"].conversion == "" and rows["lfcc"].conversion_ms is None


def test_share_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = {"lfcc": 4.0, "eager": 8.0, "baseline": 3.0}

    def costing(name: str) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            clock.append(cost[name])
            return 2 * x

        return call

    clock: list[float] = []
    monkeypatch.setattr(Cpu, "seconds", lambda self, call, *_: (call(), clock[-1])[1])
    step = case(candidates={name: costing(name) for name in ("lfcc", "eager")}, baseline=costing("baseline"), steps=())
    rows = rows_of(step)
    assert rows["lfcc"].share_of_step == pytest.approx(1 / 4)
    assert rows["eager"].share_of_step == pytest.approx(5 / 8)
    assert rows[BASELINE].share_of_step == 0 and rows[BASELINE].error is None


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A record of three cases, the second of which is interrupted the first time."""
    calls = iter([KeyboardInterrupt])

    def interrupted(x: Tensor) -> Tensor:
        if error := next(calls, None):
            raise error
        return 2 * x

    made = [case("one"), case("two", candidates={"lfcc": interrupted, "eager": double}), case("three")]
    monkeypatch.setitem(suites.SUITES, "lowpass", lambda machine, dtype: made)
    path = tmp_path / "record.json"
    record.save(path, runner.start(REQUEST))
    return path


def notes(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in record.rows(record.load(path)):
        found.setdefault(row.label, []).append(row.note)
    return found


def test_interruption_keeps_the_measured_cases(begun: Path) -> None:
    assert notes(begun) == {label: [NOT_REACHED] for label in ("one", "two", "three")}
    assert runner.work(begun, time.time() + 60) == 130
    assert notes(begun) == {"one": ["", "", ""], "two": [NOT_REACHED], "three": [NOT_REACHED]}
    kept = [row for row in record.rows(record.load(begun)) if row.label == "one"]
    record.save(begun, runner.resume(record.load(begun)))
    assert runner.work(begun, time.time() + 60) == 0
    rows = record.rows(record.load(begun))
    assert [row for row in rows if row.label == "one"] == kept
    assert all(row.status == "ok" for row in rows) and len({row.label for row in rows}) == 3
    with pytest.raises(ValueError, match="complete"):
        runner.resume(record.load(begun))


def test_time_limit_leaves_the_remaining_cases(begun: Path) -> None:
    assert runner.work(begun, time.time() - 1) == 0
    assert notes(begun) == {label: [NOT_REACHED] for label in ("one", "two", "three")}


def test_a_case_that_ended_its_process_is_measured_again_only_by_resume(begun: Path) -> None:
    results = record.load(begun)
    rows = [
        replace(row, status="failed", note=runner.ENDED) if row.label == "two" else row for row in record.rows(results)
    ]
    record.put(results, "default", {}, rows)
    record.save(begun, results)
    assert runner.work(begun, time.time() + 60) == 0
    assert notes(begun)["two"] == [runner.ENDED]
    assert [row.note for row in record.rows(runner.resume(results)) if row.label == "two"] == [NOT_REACHED]


@pytest.mark.parametrize("key", ["device", "torch", "commit"])
def test_resume_needs_the_same_machine_and_versions(begun: Path, key: str) -> None:
    results = record.load(begun)
    results["runs"]["default"]["environment"] = Cpu().environment() | {key: "another"}
    with pytest.raises(ValueError, match=f"begun with {key} another"):
        runner.resume(results)


def test_unknown_case_raises(begun: Path) -> None:
    with pytest.raises(ValueError, match="no case of lowpass matches -k fourth"):
        runner.start(replace(REQUEST, words=["fourth"]))


def test_csv_and_json_agree(begun: Path) -> None:
    runner.work(begun, time.time() + 60)
    results = record.load(begun)
    lines = list(csv.DictReader(begun.with_suffix(".csv").open()))
    assert len(lines) == len(record.rows(results))
    for line, row in zip(lines, record.rows(results), strict=True):
        assert line["case"] == row.case and line["candidate"] == row.candidate and line["shape"] == f"{SIDE}x{SIDE}"
        assert float(line["median_ms"] or 0) == (row.median_ms or 0)
        assert line["torch"] == torch.__version__
        assert line["device"] == results["runs"]["default"]["environment"].get("device", "")


@pytest.mark.slow
def test_peak_memory_in_a_separate_process() -> None:
    request = replace(REQUEST, suites=["info_nce", "lowpass"], size="full")
    matrix = 4 * 1024**2
    both = dict.fromkeys(("lfcc", "eager"))
    peaks = Cpu().peak_memory(request, "info_nce-one-way-1024x512-float32-fwd+bwd", both)
    assert peaks["eager"] > 2 * matrix  # the products and their softmax
    assert 2 * peaks["lfcc"] < peaks["eager"]
    not_scalar = Cpu().peak_memory(request, "lowpass-nchw-64x256x14x14-float32-fwd+bwd", {"lfcc": None})
    assert not_scalar.keys() == {"lfcc"}


def bench(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    root = Path(record.__file__).parents[2]
    variables = {**os.environ, "PYTHONPATH": str(root), "LFCC_BENCH_SIZE": "tiny", **environment}
    command = [sys.executable, "-m", "lfcc_kernels.cli", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    ended = bench("overhead", "lowpass", "-k", "overhead-lowpass", "7x7", "-o", "record.json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    rows = record.rows(record.load(tmp_path / "record.json"))
    assert {row.suite for row in rows} == {"overhead", "lowpass"} and all(
        row.is_lfcc or row.backend == "" for row in rows
    )
    assert all(row.status == "ok" for row in rows if row.is_lfcc)
    assert (tmp_path / "record.csv").exists() and "Slower than the fastest peer" in (tmp_path / "record.md").read_text()
    again = bench("--resume", "record.json", cwd=tmp_path)
    assert again.returncode == 1 and "complete" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lowpas"], "unknown suite lowpas; choose from overhead, lowpass"),
        (["--backend", "cuDNN"], "'cuDNN' is not available"),
        (["-k", "nothing"], "matches -k nothing"),
        (["--resume"], "no unfinished record"),
        (["--resume", "notes.json"], "notes.json is not a record"),
        (["--resume", "notes.json", "--dtype", "bfloat16"], "only --minutes may be given"),
        (["--compare", "notes.json", "notes.json"], "notes.json is not a record"),
    ],
)
def test_user_errors_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "notes.json").write_text(json.dumps({"notes": []}))
    ended = bench(*arguments, cwd=tmp_path)
    assert ended.returncode == 1 and ended.stderr.startswith("lfcc: error: ") and message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path: Path) -> None:
    assert "needs an NVIDIA GPU, but torch" in bench("--device", "cuda", cwd=tmp_path).stderr
