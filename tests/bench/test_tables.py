"""The tables of a record."""

import re

import pytest
from rows import results, row

from lfcc_kernels.bench import tables
from lfcc_kernels.bench.record import BASELINE, Row
from lfcc_kernels.bench.tables import rankings

FASTER, SLOWER, SLOWEST = (f"lowpass-nchw-2x8x{side}x{side}-float32-fwd" for side in (4, 8, 16))
LFCC = "lfcc-average-128x4x3-float32-fwd+bwd"


def timed(case: str, **milliseconds: float) -> list[Row]:
    return [row(case, name.replace("_", " "), median_ms=median) for name, median in milliseconds.items()]


def test_slower_cases_come_first_with_speedup_and_fastest_peer():
    made = results(
        *timed(FASTER, lfcc=1, eager=9, compiled_eager=2.5),
        *timed(SLOWER, lfcc=2, eager=8, compiled_eager=1.5),
        *timed(SLOWEST, lfcc=2, eager=0.9996, compiled_eager=3),
    )
    slower, others = tables.times(made)
    assert [line["case"] for line in slower] == [
        "lowpass nchw 2x8x16x16 float32 fwd",
        "lowpass nchw 2x8x8x8 float32 fwd",
    ]
    assert [line["speedup over fastest peer"] for line in slower] == [
        "0.499x eager, 1 ms",
        "0.75x compiled eager, 1.5 ms",
    ]
    assert [line["speedup over fastest peer"] for line in others] == ["2.5x compiled eager, 2.5 ms"]
    text = tables.markdown(made)
    assert "slower than the fastest peer in 2 of 3 cases" in text
    assert text.index("Abacus 9000") < text.index("2x8x16x16") < text.index("2x8x8x8") < text.index("2x8x4x4")


def test_speedup_just_below_one_is_rounded_down():
    slower, _ = tables.times(results(*timed(SLOWER, lfcc=1, eager=0.99999)))
    assert slower[0]["speedup over fastest peer"].startswith("0.999x")


def test_step_without_the_loss_is_not_a_peer():
    made = [*timed(LFCC, lfcc=3, eager=4), row(LFCC, BASELINE, median_ms=2, peak_memory_bytes=0)]
    (found,) = rankings(made)
    assert (found.fastest.candidate, [peer.candidate for peer in found.peers]) == ("eager", ["eager"])


def test_lfcc_on_another_backend_is_not_a_peer():
    made = [*timed(FASTER, lfcc=1, eager=3), row(FASTER, "lfcc, eager", median_ms=0.5)]
    (found,) = rankings(made)
    assert (found.fastest.candidate, found.speedup, found.others[0].candidate) == ("eager", 3, "lfcc, eager")
    _, (line,) = tables.times(results(*made))
    assert line["by backend, ms"] == "cpu 1, eager 0.5"


def test_ranking_needs_times_of_lfcc_and_a_peer():
    made = [row(FASTER, "lfcc"), row(SLOWER, "eager"), row(SLOWEST, "lfcc"), row(SLOWEST, "eager", status="failed")]
    assert rankings(made) == []
    assert "in 0 of 0 cases" in tables.markdown(results(*made))


def test_conversion_of_the_fastest_peer_has_its_own_column():
    converting = {"conversion": "bfloat16", "conversion_ms": 4.0}
    made = [*timed(FASTER, lfcc=1, eager=3), row(FASTER, "memeff", median_ms=2, **converting)]
    _, (line,) = tables.times(results(*made))
    assert line["speedup over fastest peer"] == "2x memeff, 2 ms"
    assert line["conversion for that peer"] == "bfloat16, 4 ms"
    slow = [*timed(FASTER, lfcc=1, eager=3), row(FASTER, "memeff", median_ms=5, **converting)]
    assert "conversion for that peer" not in tables.times(results(*slow))[1][0]


def test_floor_error_and_share_of_the_step():
    made = [
        row(FASTER, "lfcc", bytes=2 * 10**6, median_ms=0.5, fraction_of_floor=0.4, error=2e-7),
        row(FASTER, "eager", median_ms=2, error=3e-6, reference="float32"),
        row(LFCC, "lfcc", bytes=1, flops=10**9, fraction_of_floor=0.1, share_of_step=0.031),
        row(LFCC, "eager", share_of_step=0.2),
    ]
    slower, (whole, pooling) = tables.times(results(*made))
    assert slower == []
    assert (pooling["fraction of floor"], pooling["error, lfcc / eager"]) == ("40%, 4 GB/s", "2e-07 / 3e-06*")
    assert pooling["share of step, lfcc / eager"] == ""
    assert (whole["fraction of floor"], whole["share of step, lfcc / eager"]) == ("10%, 1 TFLOP/s", "3.1% / 20.0%")


@pytest.mark.parametrize(("eager", "measured", "met"), [(10, "10 x", "yes"), (4, "4 x", "no")])
def test_verdict_on_a_target(eager, measured, met):
    made = tables.targets(results(*timed(LFCC, lfcc=1, eager=eager)))
    line = next(line for line in made if line["what"] == "LFCC loss, B = 128, fwd+bwd: speedup over eager")
    assert (line["run"], line["target"], line["measured"]) == ("default", ">= 5 x", measured)
    assert line["met"] == met
    assert line is made[0]  # targets that were not measured come last
    assert {other["measured"] for other in made[1:]} == {"not measured"}


def test_each_run_has_its_own_targets_and_lines():
    heaps = [
        row(LFCC, name, run=run, median_ms=ms)
        for run, times in (("default", (1, 6)), ("kept", (1, 2)))
        for name, ms in zip(("lfcc", "eager"), times, strict=True)
    ]
    made = results(*heaps)
    assert [line["run"] for line in tables.times(made)[1]] == ["kept", "default"]
    verdicts = [(line["run"], line["met"]) for line in tables.targets(made) if line["met"]]
    assert verdicts == [("kept", "no"), ("default", "yes")]


def test_candidates_that_were_not_timed_have_reason_and_error():
    made = results(
        *timed(FASTER, lfcc=1, eager=2),
        *(
            row(case, "memeff", status="skipped", note="no module | memeff", error=None)
            for case in (FASTER, SLOWER, SLOWEST, LFCC)
        ),
        row(FASTER, "open_clip", status="failed", note="RuntimeError: no", error=None),
        row(FASTER, "kornia", status="wrong", note="deviates", error=0.02),
    )
    assert [tuple(line.values()) for line in tables.not_timed(made)] == [
        ("kornia", "default", "wrong", "deviates", "lowpass nchw 2x8x4x4 float32 fwd (error 2.0e-02)"),
        ("open_clip", "default", "failed", "RuntimeError: no", "lowpass nchw 2x8x4x4 float32 fwd"),
        ("memeff", "default", "skipped", "no module | memeff", "4 cases"),
    ]
    assert r"no module \| memeff" in tables.markdown(made)


def test_memory_is_in_mebibytes():
    made = results(
        row(FASTER, "lfcc", peak_memory_bytes=2**20),
        row(FASTER, "lfcc, eager", peak_memory_bytes=3 * 2**20),
        row(FASTER, "eager", peak_memory_bytes=2**19),
        row(SLOWER, "lfcc"),
    )
    assert tables.memory(made) == [
        {"case": "lowpass nchw 2x8x4x4 float32 fwd", "lfcc": "1.0; eager 3.0", "peers": "eager 0.5"}
    ]


def test_lines_of_markdown_tables_have_all_columns():
    made = results(*timed(FASTER, lfcc=1, eager=2), *timed(SLOWER, lfcc=2, eager=1))
    for table in re.findall(r"(?:^\|.*\|$\n?)+", tables.markdown(made), re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_facts_have_load_and_size():
    rows = (row(FASTER, "lfcc", load_average=0.5, clock_mhz=2000.0), row(FASTER, "eager", load_average=1.5))
    (fact,) = tables.facts(results(*rows, size="tiny"))
    assert fact.startswith("Default heap: Abacus 9000, 2 cores")
    assert "load average 0.5 to 1.5" in fact
    assert "clock 2000 to 2000 MHz" in fact
    assert "copy 10 to 10 GB/s" in fact
    assert "the times are meaningless" in fact


def test_facts_of_a_gpu():
    made = results(row(FASTER, "lfcc", run="cuda", gemm_gflops=7e5))
    made["runs"]["cuda"]["environment"] |= {
        "multiprocessors": 132,
        "last_cache_bytes": 50 * 2**20,
        "nvidia_smi_fields": "clocks.sm",
        "nvidia_smi": "",
        "cuda": "13.0",
        "packages": {"triton": "3.5"},
    }
    (fact,) = tables.facts(made)
    assert "132 multiprocessors, L2 50 MiB" in fact
    assert "700000 to 700000 GFLOP/s in float32" in fact
    assert "CUDA 13.0, triton 3.5" in fact
    assert "GPU times are device times" in tables.markdown(made)
