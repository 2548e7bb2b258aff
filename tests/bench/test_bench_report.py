"""The HTML report of a record and its plots."""

import base64
import re
from itertools import pairwise

import pytest
from matplotlib.colors import to_hex
from rows import results, row

from lfcc_kernels.bench import record
from lfcc_kernels.bench.plots import LFCC, SLOWER, plots, series
from lfcc_kernels.bench.report import write_report

POOLING, PRODUCTS = "lowpass-nchw-2x8x4x4-float32-fwd", "info_nce-one-way-4096x512-float32-fwd+bwd"
NAMES = ["time-against-b", "memory-against-b", "speedups", "roofline", "bandwidth", "floors"]


def growing(candidate: str, milliseconds: float, **fields) -> list[record.Row]:
    return [
        row(
            f"scaling-info_nce-{batch}x8-float32-fwd",
            candidate,
            axis="B",
            x=batch,
            median_ms=milliseconds * batch,
            peak_memory_bytes=1024 * batch,
            **fields,
        )
        for batch in (64, 128, 4096)
    ]


def rows() -> list[record.Row]:
    return [
        row(POOLING, "lfcc", median_ms=2, fraction_of_floor=0.05),
        row(POOLING, "eager", median_ms=1),
        row(PRODUCTS, "lfcc", flops=10**8, fraction_of_floor=0.95),
        row(PRODUCTS, "eager", flops=10**8, median_ms=4),
        *growing("eager", 0.2),
        *growing("lfcc", 0.1),
    ]


def figure(name: str, drawn: list) -> object:
    return next(picture for picture in drawn if picture.name == name).figure


def test_page_has_all_tables_and_plots(tmp_path):
    path = tmp_path / "record.json"
    record.save(path, results(*rows(), row(POOLING, "kornia", status="skipped", note="1 < 2")))
    page = write_report(path, tmp_path / "out")
    text = page.read_text()
    shown = [base64.b64decode(code) for code in re.findall(r"data:image/png;base64,([^\"]+)", text)]
    assert shown == [(page.parent / f"{name}.png").read_bytes() for name in NAMES]
    assert all(picture.startswith(b"\x89PNG") for picture in shown)
    assert (page.parent / "record.csv").read_bytes() == (tmp_path / "record.csv").read_bytes()
    assert record.load(page.parent / "record.json") == record.load(path)
    assert not re.search(r'(src|href)="(?!data:|record\.)', text)
    assert "Abacus 9000" in text
    assert "<td>0.5x eager, 1 ms</td>" in text
    assert "<td>1 &lt; 2</td>" in text
    assert text.index("Slower than") < text.index("0.5x eager") < text.index("Faster than") < text.index("4x eager")
    assert {file.name for file in page.parent.iterdir()} == {
        "report.html", "record.json", "record.csv", "record.md", *(f"{name}.png" for name in NAMES)
    }  # fmt: skip


def test_page_in_the_folder_of_its_record(tmp_path):
    path = tmp_path / "record.json"
    record.save(path, results(row(POOLING, "lfcc", status="failed", note="no")))
    before = path.stat().st_mtime_ns
    assert "<td>no</td>" in write_report(path, tmp_path).read_text()
    assert path.stat().st_mtime_ns == before
    assert not list(tmp_path.glob("*.png"))


def test_plots_show_one_of_two_heaps(tmp_path):
    path = tmp_path / "record.json"
    record.save(
        path, results(*(row(POOLING, name, run=run) for run in ("kept", "default") for name in ("lfcc", "eager")))
    )
    text = write_report(path, tmp_path).read_text()
    assert "slower in 0 of 1 cases" in text  # the plots
    assert "in 0 of 2 cases" in text  # the tables
    assert "The plots show the run with the default heap." in text


def test_record_without_rows_raises(tmp_path):
    path = tmp_path / "record.json"
    record.save(path, results())
    with pytest.raises(ValueError, match="no rows"):
        write_report(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lines_of_a_series():
    drawn = series(rows())
    (axes,) = figure("time-against-b", drawn).axes
    lines = {to_hex(line.get_color()): line.get_xydata().tolist() for line in axes.lines}
    assert lines[LFCC] == [[64, 6.4], [128, 12.8], [4096, 409.6]]
    assert len(lines) == 2
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_ylabel()) == ("log", "log", "time (ms)")
    band = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.9 * 6.4, 1.1 * 409.6))
    (axes,) = figure("memory-against-b", drawn).axes
    assert axes.lines[0].get_ydata().tolist() == [1 / 16, 1 / 8, 4]


def test_one_panel_per_label_dtype_and_mode_and_one_plot_per_axis():
    cases = ("loss-64x8-float32-fwd", "loss-64x8-float32-fwd+bwd", "loss-64x8-bfloat16-fwd", "pooling-64x8-float32-fwd")
    made = [row(f"scaling-{case}", "lfcc", axis="H*W", x=64) for case in cases]
    (picture,) = series([*made, row(POOLING, "lfcc")])
    assert picture.name == "time-against-hxw"
    assert sorted(axes.get_title() for axes in picture.figure.axes) == [
        "loss bfloat16 fwd",
        "loss float32 fwd",
        "loss float32 fwd+bwd",
        "pooling float32 fwd",
    ]


def test_slower_cases_are_the_first_bars_in_another_color():
    (axes,) = figure("speedups", plots(rows())).axes
    bars = [(to_hex(bar.get_facecolor()), 1 + bar.get_width()) for bar in axes.patches]
    assert bars == [(SLOWER, 0.5), *[(LFCC, pytest.approx(2))] * 3, (LFCC, 4)]
    assert [text.get_text() for text in axes.texts][::4] == ["0.5x eager", "4x eager"]
    assert axes.get_yticklabels()[0].get_text() == "lowpass nchw 2x8x4x4 float32 fwd"
    bottom, top = axes.get_ylim()
    assert bottom > top  # so that the first is above


def test_roofline_has_the_measured_roof_and_rates():
    (axes,) = figure("roofline", plots(rows())).axes
    roof = axes.lines[0].get_xydata()
    assert roof[1].tolist() == [10, 100]  # copies at 10 GB/s meet GEMMs of 100 GFLOP/s
    assert roof[0, 1] == pytest.approx(10 * roof[0, 0])
    lfcc, fastest = axes.collections[1:]
    assert lfcc.get_offsets().tolist() == [[100, 100]]
    assert fastest.get_offsets().tolist() == [[100, 25]]


def test_cases_without_flops_are_shown_in_bytes_per_second():
    (axes,) = figure("bandwidth", plots([made for made in rows() if not made.axis])).axes
    assert [bar.get_width() for bar in axes.patches] == [0.5]
    assert axes.collections[0].get_offsets().tolist() == [[1, 0]]
    assert axes.lines[0].get_xdata()[0] == 10


def test_floors_are_grouped_by_suite_and_show_targets():
    slow = row("info_nce-one-way-8x8-float32-fwd", "lfcc", fraction_of_floor=0.2)
    lowpass, info_nce = figure("floors", plots([*rows(), slow])).axes
    assert [bar.get_width() for bar in lowpass.patches] == [5]
    assert [bar.get_width() for bar in info_nce.patches] == [20, 95]
    target, whole = info_nce.lines
    assert (target.get_xdata()[0], whole.get_xdata()[0]) == (90, 100)
    assert len(lowpass.lines) == 1


def test_a_hundred_long_names_do_not_overlap():
    cases = [f"lfcc-{'long-' * 8}{number}-128x4x3-float32-fwd+bwd" for number in range(100)]
    both = (("lfcc", 1), ("compiled eager, pooled first", 30))
    made = [row(case, name, median_ms=ms, fraction_of_floor=0.5) for case in cases for name, ms in both]
    for name in ("speedups", "bandwidth", "floors"):
        drawn = figure(name, plots(made))
        drawn.draw_without_rendering()
        (axes,) = drawn.axes
        boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert len(boxes) == 100
        assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))
        assert min(box.x0 for box in boxes) >= 0
        assert all(text.get_window_extent().x1 <= axes.bbox.x1 for text in axes.texts)
