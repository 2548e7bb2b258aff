"""The files of a record: round trip, errors and documentation."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from rows import results, row

from lfcc_kernels.bench import record


def test_round_trip(tmp_path: Path) -> None:
    rows = [row("lowpass-nchw-2x8x4x4-float32-fwd", name) for name in ("lfcc", "eager")]
    path = tmp_path / "device" / "record.json"
    record.save(path, results(*rows))
    assert record.rows(record.load(path)) == rows
    assert sorted(file.name for file in path.parent.iterdir()) == ["record.csv", "record.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a record"),
        ("[]", "not a record"),
        ("{}", "not a record"),
        ('{"schema": 2}', "has schema 2, but this version reads"),
    ],
)
def test_files_that_are_not_a_record(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        record.load(path)


def test_readme_documents_exactly_the_columns() -> None:
    page = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text()
    table = page.split("| column | meaning |")[1].split("\n\n")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    explained = re.findall(r"`(\w+)`", " ".join(first))
    assert explained == [*record.KEYS, *(field.name for field in fields(record.Row))]
