"""`lfcc bench --compare` reports changes beyond noise and drift, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
from rows import results, row

from lfcc_kernels.bench import compare, record
from lfcc_kernels.bench.compare import Change

CASE = "lowpass-nchw-2x8x4x4-float32-fwd"


def timed(candidate: str, median: float, spread: float = 0.0, **fields):
    """A row whose quantiles differ by `spread` times the median."""
    quantiles = {"q20_ms": median * (1 - spread / 2), "q80_ms": median * (1 + spread / 2)}
    return row(fields.pop("case", CASE), candidate, median_ms=median, **quantiles, **fields)


def changes(old: list, new: list) -> list[Change]:
    return compare.compare(results(*old), results(*new))


@pytest.mark.parametrize(
    ("median", "what"), [(1.06, ["slower"]), (1.04, []), (1.0, []), (0.96, []), (0.94, ["faster"])]
)
def test_noise_is_at_least_five_percent(median, what):
    found = changes([timed("lfcc", 1.0)], [timed("lfcc", median)])
    assert [change.what for change in found] == what
    assert all((change.old, change.new, change.drift, change.noise) == (1.0, median, 1.0, 0.05) for change in found)


@pytest.mark.parametrize(("median", "slower"), [(1.29, False), (1.31, True)])
def test_noise_is_half_the_spread_of_both_records(median, slower):
    found = changes([timed("lfcc", 1.0, 0.2)], [timed("lfcc", median, 0.4)])
    assert bool(found) == slower


@pytest.mark.parametrize(("median", "what"), [(1.7, []), (1.6, ["faster"]), (1.9, ["slower"]), (1.0, ["faster"])])
def test_drift_of_the_machine_is_that_of_the_peers(median, what):
    def peers(factor: float) -> list:
        return [timed(name, time * factor) for name, time in (("eager", 5.0), ("one-GEMM", 2.0))]

    found = changes([timed("lfcc", 1.0), *peers(1)], [timed("lfcc", median), *peers(1.75)])
    assert [change.what for change in found] == what
    assert all(change.drift == pytest.approx(1.75) for change in found)


def test_spread_of_the_peers_is_noise():
    """Ratios of 1, 1.5 and 2: the median is 1.5, the 20 % and 80 % quantiles are 1.2 and 1.8."""
    old = [timed("lfcc", 1.0), *(timed(name, 1.0) for name in "abc")]
    new = [timed(name, ratio) for name, ratio in zip("abc", (1.0, 1.5, 2.0), strict=True)]
    bound = 1.5 * (1 + 0.5 * 0.6 / 1.5)
    assert not changes(old, [timed("lfcc", 0.99 * bound), *new])
    (found,) = changes(old, [timed("lfcc", 1.01 * bound), *new])
    assert found.noise == pytest.approx(0.2) and found.drift == pytest.approx(1.5)


def test_drift_counts_common_peers_of_the_case_and_run_only():
    others = {"case": CASE.replace("4x4", "8x8")}
    old = [timed("lfcc", 1.0), timed("gone", 1.0), timed("eager", 1.0, **others), timed("eager", 1.0, run="kept")]
    new = [timed("lfcc", 2.0), timed("new", 1.0), timed("eager", 2.0, **others), timed("eager", 2.0, run="kept")]
    failed = [row(CASE, "liger", status="failed"), timed("liger", 1.0)]
    (found,) = changes([*old, failed[0], timed("lfcc, eager", 1.0)], [*new, failed[1], timed("lfcc, eager", 1.0)])
    assert found == Change("slower", "default", CASE, "lfcc", 1.0, 2.0, 1.0, 0.05)


def test_lfcc_is_compared_on_every_backend_in_every_run():
    keys = [(run, candidate) for run in ("default", "kept") for candidate in ("lfcc", "lfcc, eager")]
    old = [timed(candidate, 1.0, run=run) for run, candidate in keys]
    new = [timed(candidate, 2.0 + n, run=run) for n, (run, candidate) in enumerate(keys)]
    found = changes(old, new)
    assert [(change.run, change.candidate) for change in found] == keys[::-1]  # the worst comes first
    assert {change.what for change in found} == {"slower"}


@pytest.mark.parametrize("status", ["wrong", "failed", "skipped"])
def test_status_other_than_ok_is_broken(status):
    broken = row(CASE, "lfcc", status=status, note="deviates by 3.0e-01")
    (found,) = changes([timed("lfcc", 1.0)], [broken])
    assert (found.what, found.note) == ("broken", f"{status}: deviates by 3.0e-01")
    assert not changes([broken], [broken]) and not changes([broken], [timed("lfcc", 1.0)])


def test_rows_in_one_record_only():
    """Rows not reached count as absent; absent peers are not reported."""
    names = [CASE.replace("2x8", f"{n}x8") for n in range(4)]
    unreached = row(names[1], "lfcc", status="skipped", note=record.NOT_REACHED)
    old = [timed("lfcc", 1.0, case=names[0]), timed("lfcc", 1.0, case=names[1]), timed("eager", 1.0, case=names[0])]
    new = [timed("lfcc", 1.0, case=names[2]), unreached, timed("liger", 1.0, case=names[3])]
    found = changes(old, new)
    assert {(change.what, change.case) for change in found} == {
        ("only in OLD", names[0]), ("only in OLD", names[1]), ("only in NEW", names[2]),
    }  # fmt: skip


MIB = 2**20


@pytest.mark.parametrize(
    ("old", "new", "grown"),
    [
        (100 * MIB, 109 * MIB, False), (100 * MIB, 111 * MIB, True), (5 * MIB, int(5.9 * MIB), False),
        (0, MIB, False), (0, 2 * MIB, True), (9 * MIB, 3 * MIB, False), (None, 50 * MIB, False),
    ],
)  # fmt: skip
def test_growth_of_memory(old, new, grown):
    found = changes([timed("lfcc", 1.0, peak_memory_bytes=old)], [timed("lfcc", 1.0, peak_memory_bytes=new)])
    assert [(change.what, change.old, change.new) for change in found] == ([("memory", old, new)] if grown else [])


@pytest.mark.parametrize(
    ("dtype", "old", "new", "grown"),
    [
        ("float32", 1e-6, 1.9e-6, False), ("float32", 1e-6, 2.1e-6, True), ("float32", 1e-8, 1e-7, False),
        ("bfloat16", 1e-4, 5e-3, False), ("bfloat16", 1e-4, 9e-3, True), ("float32", None, 1e-3, False),
    ],
)  # fmt: skip
def test_growth_of_errors_beyond_rounding(dtype, old, new, grown):
    case = CASE.replace("float32", dtype)
    found = changes([timed("lfcc", 1.0, case=case, error=old)], [timed("lfcc", 1.0, case=case, error=new)])
    assert [(change.what, change.old, change.new) for change in found] == ([("error", old, new)] if grown else [])


def test_other_sizes_and_devices_raise():
    full, quick = (results(timed("lfcc", 1.0), size=size) for size in ("full", "quick"))
    with pytest.raises(ValueError, match="OLD has size full but NEW has size quick"):
        compare.compare(full, quick)
    other = results(timed("lfcc", 1.0))
    other["runs"]["default"]["environment"] = other["runs"]["default"]["environment"] | {"device": "Sundial 2"}
    with pytest.raises(ValueError, match="OLD has device Abacus 9000 but NEW has device Sundial 2"):
        compare.compare(full, other)


def save(path: Path, *rows) -> Path:
    record.save(path, results(*rows))
    return path


def test_command_fails_if_a_case_became_slower(tmp_path, capsys):
    fast, slow = timed("lfcc", 1.0, peak_memory_bytes=0), timed("lfcc", 3.0, peak_memory_bytes=8 * MIB)
    old, new = save(tmp_path / "old.json", fast), save(tmp_path / "new.json", slow)
    assert compare.main(old, new) == 1
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("slower "))
    assert CASE in line and line.split()[-6:] == ["1", "3", "3.00x", "1.00x", "3.00x", "5%"]
    assert "noise = " in printed and f"memory: default, {CASE}, lfcc, 0.0 to 8.0 MiB" in printed
    assert "1 slower, 0 faster, 0 broken" in printed
    assert compare.main(new, old) == 0
    assert "0 slower, 1 faster, 0 broken" in capsys.readouterr().out


def test_command_fails_if_a_case_broke_but_not_if_one_is_absent(tmp_path, capsys):
    cases = [CASE.replace("2x8", f"{n}x8") for n in range(7)]
    old = save(tmp_path / "old.json", *(timed("lfcc", 1.0, case=case) for case in cases))
    assert compare.main(old, save(tmp_path / "new.json", row(cases[0], "lfcc", status="failed", note="boom"))) == 1
    assert f"broken: default, {cases[0]}, lfcc, failed: boom" in capsys.readouterr().out
    assert compare.main(old, save(tmp_path / "new.json", replace(row(cases[0], "lfcc"), median_ms=1.0))) == 0
    printed = capsys.readouterr().out
    assert f"only in OLD: default, {cases[1]}, lfcc; " in printed and "; and 1 more" in printed
