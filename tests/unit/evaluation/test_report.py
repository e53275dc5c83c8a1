"""Reports: numbers are where they belong, pictures exist and show them."""

import numpy as np
import pytest

from megatron_v2pe.evaluation.retrieval import report
from megatron_v2pe.evaluation.retrieval.questions import Cell


def cell(length, depth, correct, count):
    return Cell(length=length, depth=depth, correct=correct, count=count)


SCORES = {
    "default": [cell(512, 0.1, 10, 10), cell(512, 0.9, 8, 10), cell(1024, 0.1, 0, 5)],
    "1": [cell(512, 0.1, 9, 10), cell(512, 0.9, 9, 10), cell(1024, 0.1, 4, 5), cell(1024, 0.9, 3, 5)],
}


def test_the_table_shows_every_stride_and_length():
    lines = report.accuracy_table(SCORES, trained_length=512).splitlines()
    assert lines[0].split() == ["stride", "512", "(1x)", "1024", "(2x)"]
    assert lines[2].split() == ["default", "0.900", "0.000"]
    assert lines[3].split() == ["1", "0.900", "0.700"]
    assert lines[-1].split() == ["answers", "20", "10"]
    assert len({len(line) for line in lines}) == 1


def test_a_length_that_was_not_asked_is_no_zero():
    text = report.accuracy_table({"1": SCORES["1"], "2": [cell(512, 0.1, 1, 2)]}, trained_length=512)
    assert text.splitlines()[3].split() == ["2", "0.500", "-"]


def test_the_csv_holds_all_cells():
    lines = report.cells_csv(SCORES).splitlines()
    assert lines[0] == "stride,length,depth,correct,count,accuracy"
    assert lines[1] == "default,512,0.1,10,10,1.0000"
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634)],
)
def test_wilson_intervals(correct, count, low, high):
    assert report.wilson(correct, count) == pytest.approx((low, high), abs=1e-4)


def pixels(path):
    from matplotlib.image import imread

    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return imread(path)[..., :3]


def has_color(image, color):
    """Whether more than one pixel in 500 has nearly that color."""
    return (np.abs(image - np.array(color)).max(axis=-1) < 0.02).mean() > 0.002


def test_the_heat_map_keeps_cells_apart(tmp_path):
    path = tmp_path / "h.png"
    report.write_heat_map(path, SCORES["default"], stride="default", tokens_per_tile=4, trained_length=512)
    image = pixels(path)
    from matplotlib import colors

    for color in ("#3fbf8f", "#e8596f", "0.85"):  # all right, all wrong, never asked
        assert has_color(image, colors.to_rgb(color)), color
    assert [entry.name for entry in tmp_path.iterdir()] == ["h.png"]


def test_the_heat_maps_axes_are_not_swapped():
    cells = [cell(512, 0.1, 1, 2), cell(512, 0.9, 2, 2), cell(1024, 0.1, 0, 3)]
    grid, counts = report._grid(cells, [512, 1024], [0.1, 0.9])
    np.testing.assert_array_equal(grid, [[0.5, 0.0], [1.0, np.nan]])
    np.testing.assert_array_equal(counts, [[2, 3], [2, 0]])


def test_lines_over_length_are_drawn(tmp_path):
    path = tmp_path / "a.png"
    report.write_accuracy_by_length(path, SCORES, tokens_per_tile=4, trained_length=512)
    assert has_color(pixels(path), (0x1F / 255, 0x77 / 255, 0xB4 / 255))


def test_strides_of_a_single_length_are_drawn_together(monkeypatch, tmp_path):
    """They are shifted a little so that their bars do not overlap, but it is one length."""
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    scores = {name: [cell(512, 0.1, 1, 10)] for name in ("default", "1", "2")}
    report.write_accuracy_by_length(tmp_path / "a.png", scores, tokens_per_tile=4, trained_length=512)
    axes = figures[0].axes[0]
    places = [
        axes.transAxes.inverted().transform(axes.transData.transform((512 * f, 0)))[0] for f in (1, 1.04)
    ]
    assert 0.4 < places[0] < places[1] < 0.6
