"""The figure in the README is drawn from a committed record."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
from rows import results, row

from lfcc_kernels.bench import record
from lfcc_kernels.bench.loss_figure import loss_values
from lfcc_kernels.bench.report import write_report

ROOT = Path(__file__).parents[2]
FIGURE = ROOT / "docs/images/loss.svg"
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"


def metadata(svg: Path, field: str) -> str:
    return ElementTree.parse(svg).find(f".//{DUBLIN_CORE}{field}").text


def test_figure_is_drawn_from_its_record(tmp_path):
    source = ROOT / "benchmarks/results" / metadata(FIGURE, "source")
    expected = loss_values(record.rows_of(record.load(source)["runs"]["default"]))
    assert json.loads(metadata(FIGURE, "description")) == expected
    write_report(source, tmp_path)
    redrawn = (tmp_path / "loss.svg").read_text()
    assert redrawn.startswith("<?xml")
    if f"Matplotlib v{matplotlib.__version__}," in FIGURE.read_text():
        assert redrawn == FIGURE.read_text()
    assert re.search(r"data:image/svg\+xml;base64,", (tmp_path / "report.html").read_text())


def case(label: str, batch: int, **milliseconds: float) -> list[record.Row]:
    suite, name = label.split("-", 1)
    return [
        row(
            f"{suite}-{name}-{batch}x4x3-float32-fwd+bwd",
            candidate.replace("_", " "),
            median_ms=ms,
            peak_memory_bytes=2**20 * batch,
        )
        for candidate, ms in milliseconds.items()
    ]


def test_values_are_those_of_candidates_measured_at_every_batch_size():
    rows = [
        *case("scaling-lfcc-over-B", 512, lfcc=3, eager=6, compiled_eager=5),
        *case("scaling-lfcc-over-B", 128, lfcc=1, eager=2),
        *case("lfcc-average", 128, lfcc=4, eager=8, kornia=1),
    ]
    assert loss_values(rows) == {
        "pair": {"B": [128], "lfcc": {"time": [4], "memory": [128]}, "eager": {"time": [8], "memory": [128]}},
        "series": {
            "B": [128, 512],
            "lfcc": {"time": [1, 3], "memory": [128, 512]},
            "eager": {"time": [2, 6], "memory": [128, 512]},
        },
    }


def test_record_without_the_whole_loss_has_no_figure(tmp_path):
    rows = [row("lowpass-nchw-2x8x4x4-float32-fwd", name) for name in ("lfcc", "eager")]
    path = tmp_path / "record.json"
    record.save(path, results(*rows))
    write_report(path, tmp_path / "out")
    assert not (tmp_path / "out/loss.svg").exists()
