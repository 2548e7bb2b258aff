"""The HTML report on run folders."""

import base64
import json
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lfcc_kernels.distill.report import Picture, text_table, write_report

SUMMARY = """epoch,step,top1,best_top1,lr,loss,ce,ce_weighted,images_per_second,data_share,loss_share,seconds
1,10,40.0,40.0,0.001,2.0,2.0,2.0,500.0,0.01,0.05,2.5
2,20,45.5,45.5,0.0005,1.5,1.5,1.5,510.0,0.01,0.0456,5.0
"""
STEPS = {
    "labels": "epoch,step,lr,loss,ce,ce_weighted\n1,10,0.001,2.0,2.0,2.0\n2,20,0.0005,1.5,1.5,1.5\n",
    "lfcc": "epoch,step,lr,loss,ce,ce_weighted,lfcc,lfcc_weighted\n1,10,0.001,6.0,2.0,2.0,4.0,4.0\n",
}
VERSIONS = {"python": "3.11", "backends": ["eager", "cpu"], "gpu": None}


def make_run(folder: Path, steps: str, versions: dict | None = VERSIONS) -> Path:
    folder.mkdir(parents=True)
    (folder / "summary.csv").write_text(SUMMARY)
    (folder / "steps.csv").write_text(steps)
    if versions is not None:
        (folder / "versions.json").write_text(json.dumps(versions))
    return folder


def test_page_has_tables_plots_and_data(tmp_path):
    runs = [make_run(tmp_path / name, steps) for name, steps in STEPS.items()]
    page = write_report(runs, tmp_path / "out", title="1 < 2", text=["so & so"])
    text = page.read_text()
    assert "<h1>1 &lt; 2</h1>" in text
    assert "so &amp; so" in text
    assert "45.50" in text
    assert "4.6%" in text
    assert "<td>eager, cpu</td>" in text
    assert not re.search(r'(src|href)="(?!data:|labels-|lfcc-)', text)
    pictures = [base64.b64decode(code) for code in re.findall(r"data:image/png;base64,([^\"]+)", text)]
    assert pictures == [(page.parent / f"{name}.png").read_bytes() for name in ("accuracy", "terms")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    for name, steps in STEPS.items():
        assert (page.parent / f"{name}-steps.csv").read_text() == steps
        assert (page.parent / f"{name}-summary.csv").read_text() == SUMMARY
    assert not list(page.parent.glob(".tmp*"))


def test_own_table_and_pictures(tmp_path):
    run = make_run(tmp_path / "run", STEPS["labels"])
    picture = Picture("mine", "My picture", "What is seen", Figure())
    page = write_report([run], tmp_path, table=[{"arm": "first", "accuracy": "12"}], pictures=[picture])
    assert "<td>first</td><td>12</td>" in page.read_text()
    assert "best top-1" not in page.read_text()
    assert "What is seen" in page.read_text()
    assert (tmp_path / "mine.png").is_file()


def test_runs_of_one_name_and_of_two_places(tmp_path):
    runs = [
        make_run(tmp_path / "a" / "run", STEPS["labels"]),
        make_run(tmp_path / "b" / "run", STEPS["labels"], versions={"python": "3.12"}),
        make_run(tmp_path / "c" / "run", STEPS["labels"], versions=None),
    ]
    text = write_report(runs, tmp_path / "out").read_text()
    assert "<td>python</td><td>3.11</td><td>3.12</td><td>-</td>" in text
    assert {path.name for path in (tmp_path / "out").glob("*-steps.csv")} == {f"{x}-run-steps.csv" for x in "abc"}


@pytest.mark.parametrize("summary", [None, "", "epoch,step\n"])
def test_folder_without_a_finished_epoch_raises(summary, tmp_path):
    (tmp_path / "run").mkdir()
    if summary is not None:
        (tmp_path / "run" / "summary.csv").write_text(summary)
    with pytest.raises(FileNotFoundError, match=r"run is not a run folder with a finished epoch: summary\.csv"):
        write_report([tmp_path / "run"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_table():
    assert text_table([{"": "a", "x": "1"}, {"": "long", "x": "22"}]).splitlines() == [
        "       x",
        "----  --",
        "a      1",
        "long  22",
    ]
