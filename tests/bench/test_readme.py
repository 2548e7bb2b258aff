"""The figures in the README are those of a committed record."""

import re
from pathlib import Path

from lfcc_kernels.bench import record, tables

ROOT = Path(__file__).parents[2]


def test_the_readme_has_the_tables_of_its_record() -> None:
    page = (ROOT / "README.md").read_text()
    named = set(re.findall(r"benchmarks/results/[\w-]+/[\d-]+\.json", page))
    assert named
    for name in named:
        results = record.load(ROOT / name)
        assert tables.overview(results) in page
        assert (ROOT / name).with_suffix(".md").read_text() == tables.markdown(results) + "\n"
