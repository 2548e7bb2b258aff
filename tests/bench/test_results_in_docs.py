"""The figures in README.md and docs/benchmarks.md come from committed records."""

import re
from pathlib import Path

import pytest

from lfcc_kernels.bench import record, tables

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md"]
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"

# The rows of the README's table: its first column, the case and the run of the record.
SUMMARY = {
    "whole `LFCCLoss`, 4 stages x 3 scales, B = 128": ("lfcc-average-128x4x3-float32-fwd+bwd", "default"),
    "the same with a heap that keeps its memory": ("lfcc-average-128x4x3-float32-fwd+bwd", "kept"),
    "`lowpass`, (32, 256, 56, 56), forward": ("lowpass-nchw-32x256x56x56-float32-fwd", "default"),
    "`lowpass`, (32, 256, 56, 56)": ("lowpass-nchw-32x256x56x56-float32-fwd+bwd", "default"),
    "`info_nce`, B = 4096, D = 512": ("info_nce-one-way-4096x512-float32-fwd+bwd", "default"),
    "`lowpass`, (128, 512, 7, 7)": ("lowpass-nchw-128x512x7x7-float32-fwd+bwd", "default"),
    "`info_nce`, B = 1024, D = 512, bfloat16, forward": ("info_nce-one-way-1024x512-bfloat16-fwd", "default"),
}

# Candidates of the record under the README's names.
NAMES = {
    "compiled eager, pooled first": "`torch.compile`, pool first",
    "cascade": "repeated `avg_pool2d`",
    "SDPA as gradient": "attention as gradient",
    "one-GEMM": "one GEMM",
}


def records_of(page: Path) -> list[Path]:
    """The records that a page names."""
    named = set(re.findall(r"benchmarks/results/[\w-]+/[\d-]+\.json", page.read_text()))
    return [ROOT / name for name in sorted(named)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_a_committed_record(page: Path) -> None:
    assert records_of(page)
    assert all(path.is_file() for path in records_of(page))


def test_benchmarks_page_has_the_tables_of_its_record() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for path in records_of(ROOT / "docs" / "benchmarks.md"):
        results = record.load(path)
        assert tables.overview(results) in page
        assert path.with_suffix(".md").read_text() == tables.markdown(results) + "\n"


@pytest.mark.parametrize("name", SUMMARY)
def test_readme_has_the_rows_of_its_record(name: str) -> None:
    case, run = SUMMARY[name]
    readme = ROOT / "README.md"
    (path,) = records_of(readme)
    timed = [row for row in record.rows(record.load(path)) if (row.case, row.run) == (case, run) and row.median_ms]
    lfcc = next(row for row in timed if row.candidate == "lfcc")
    eager = next(row for row in timed if row.candidate == "eager")
    fastest = min((row for row in timed if row.peer), key=lambda row: row.median_ms)
    cells = [
        name,
        f"{lfcc.median_ms:.3g} ms",
        f"{fastest.median_ms:.3g} ms, {NAMES.get(fastest.candidate, fastest.candidate)}",
        f"{fastest.median_ms / lfcc.median_ms:.2f}x",
        f"{eager.median_ms / lfcc.median_ms:.1f}x",
    ]
    assert f"| {' | '.join(cells)} |" in readme.read_text().replace("**", "")


def test_readme_has_the_memory_and_the_count_of_its_record() -> None:
    readme = (ROOT / "README.md").read_text()
    (path,) = records_of(ROOT / "README.md")
    rows = record.rows(record.load(path))

    def memory(case: str, candidate: str) -> str:
        found = (row for row in rows if (row.case, row.candidate, row.run) == (case, candidate, "default"))
        return f"{next(found).peak_memory_bytes / 2**20:.0f} MiB"

    loss, info_nce = "lfcc-average-128x4x3-float32-fwd+bwd", "info_nce-one-way-4096x512-float32-fwd+bwd"
    text = " ".join(readme.split())
    assert f"whole loss {memory(loss, 'lfcc')} (eager: {memory(loss, 'eager')})" in text
    assert f"{memory(info_nce, 'lfcc')} (attention as gradient: {memory(info_nce, 'SDPA as gradient')})" in text
    slower, cases = re.search(r"(\d+) of (\d+) cases", tables.summary(record.load(path))).groups()
    assert f"in {slower} of the {cases} cases" in text


def test_readme_quotes_the_committed_demo() -> None:
    readme, demo = (ROOT / "README.md").read_text(), (RESULTS / "demo-2026-11-23.md").read_text()
    quoted = re.findall(r"\d+\.\d ± \d+\.\d", readme)
    assert len(quoted) == 4
    assert all(figure in demo for figure in quoted)
