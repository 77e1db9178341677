"""The charts are pictures of the numbers they were given."""

import numpy as np
import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring.charts import (
    GREY,
    Bar,
    Cell,
    contact_sheet,
    draw_bars,
    draw_histogram,
    draw_intervals,
    draw_number,
    draw_scatter,
    draw_shares,
    draw_table,
    stack_pictures,
)

BLUE, ORANGE, DARK = (38, 92, 196), (206, 84, 30), (40, 40, 46)
NAN, INF = float("nan"), float("inf")


def coloured(picture, colour, tolerance=30):
    return np.abs(picture.astype(int) - colour).sum(axis=2) < tolerance


def test_a_histogram_is_as_high_as_its_counts():
    hit = coloured(draw_histogram({"a": [1.0] * 10 + [2.0] * 5}, bins=2), BLUE)
    heights = hit[:, 68:].sum(axis=0)
    left, right = heights[: len(heights) // 2].max(), heights[len(heights) // 2 :].max()
    assert left == pytest.approx(2 * right, abs=3)


def test_values_beyond_the_axis_are_counted_at_its_ends():
    beyond = draw_histogram({"a": [-5.0, 0.5, 9.0]}, bins=4, low=0, high=1)
    at_ends = draw_histogram({"a": [0.0, 0.5, 1.0]}, bins=4, low=0, high=1)
    np.testing.assert_array_equal(beyond, at_ends)


def test_two_groups_of_a_histogram_are_both_seen_where_they_overlap():
    alone = draw_histogram({"a": [1.0, 2.0]}, bins=2)
    both = draw_histogram({"a": [1.0, 2.0], "b": [1.0, 2.0]}, bins=2)
    assert coloured(alone, BLUE).any()
    assert not coloured(both[60:], BLUE, 20).any()  # neither colour is left pure
    assert not coloured(both[60:], ORANGE, 20).any()


def line_rows(picture):
    """Rows of the dark line per column, inside the axes."""
    hit = coloured(picture[60:500, 80:880], DARK, 10)
    return {x: np.flatnonzero(hit[:, x]).mean() for x in range(hit.shape[1]) if hit[:, x].any()}


@pytest.mark.parametrize("slope", [2.0, -2.0])
def test_the_line_of_a_scatter_goes_where_the_points_go(slope):
    rows = line_rows(draw_scatter({"all": [(x, slope * x) for x in range(10)]}))
    rise = rows[min(rows)] - rows[max(rows)]
    assert rise * slope > 300


def test_without_the_line_there_is_none():
    points = {"all": [(x, 3.0 * x) for x in range(10)]}
    assert line_rows(draw_scatter(points))
    assert not line_rows(draw_scatter(points, line=False))


def test_points_lie_where_their_values_say():
    hit = coloured(draw_scatter({"all": [(0, 0), (0, 1), (1, 0)]}, line=False), BLUE, 150)
    rows, columns = np.nonzero(hit)
    low_left = (rows > 450) & (columns < 150)
    high_left = (rows < 120) & (columns < 150)
    low_right = (rows > 450) & (columns > 800)
    assert low_left.any()
    assert high_left.any()
    assert low_right.any()
    assert (low_left | high_left | low_right).all()


def bar_lengths(picture):
    hit = coloured(picture, BLUE) | coloured(picture, ORANGE)
    return [int(n) for n in hit.sum(axis=1) if n > 20]


def test_bars_are_as_long_as_their_values():
    lengths = bar_lengths(draw_bars([Bar(label="a", value=4.0), Bar(label="b", value=1.0)]))
    assert max(lengths) == pytest.approx(4 * min(lengths), rel=0.05)


def test_a_negative_bar_goes_to_the_other_side():
    picture = draw_bars([Bar(label="a", value=1.0), Bar(label="b", value=-1.0)], zero=True)
    assert np.nonzero(coloured(picture, BLUE))[1].min() >= np.nonzero(coloured(picture, ORANGE))[1].max() - 1


def test_an_interval_reaches_from_its_low_to_its_high_end():
    def ends(high):
        picture = draw_bars([Bar(label="a", value=1.0, low=0.5, high=high), Bar(label="b", value=4.0)])
        columns = np.nonzero(coloured(picture[50:75, 40:], DARK, 10)[12])[0]
        return columns[columns < 800].max() - columns.min()

    assert ends(3.0) == pytest.approx(5 * ends(1.0), rel=0.1)


def test_numbers_stand_on_the_right_of_their_column_and_words_on_the_left():
    picture = draw_table(["a long header", "another header"], [["x", "1"], ["y", "22"]])
    middle = picture.shape[1] // 2
    row = coloured(picture[30:54], DARK, 200)
    assert np.nonzero(row[:, :middle])[1].max() < middle // 2
    assert np.nonzero(row[:, middle:])[1].min() > middle // 2


def test_a_row_that_does_not_fit_the_header_is_an_error():
    with pytest.raises(ErnieError, match="2 cells and its header 1"):
        draw_table(["a"], [["1", "2"]])


def test_a_number_is_written_on_a_copy():
    picture = np.full((90, 120, 3), 200, np.uint8)
    marked = draw_number(picture, "7.31")
    assert (picture == 200).all()
    assert marked.shape == picture.shape
    assert (marked[50:] == 200).all()  # only the corner
    assert (marked[:20, :40] != 200).any()


def test_a_contact_sheet_holds_every_picture_in_its_order():
    shades = [40, 90, 140, 190, 240]
    sheet = contact_sheet(
        (Cell(picture=np.full((64, 64, 3), s, np.uint8), text=str(s), label="name") for s in shades),
        columns=3,
        cell_px=100,
    )
    found = [int(sheet[8 + 80 + i // 3 * 128, 8 + 50 + i % 3 * 108, 0]) for i in range(5)]
    assert found == shades


def test_a_contact_sheet_keeps_the_aspect_ratio():
    sheet = contact_sheet([Cell(picture=np.zeros((50, 200, 3), np.uint8), text="")], cell_px=160)
    rows, columns = np.nonzero((sheet < 30).all(axis=2))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (40, 160)


def test_stacked_pictures_keep_their_pixels():
    a, b = np.full((3, 5, 3), 7, np.uint8), np.full((2, 2, 3), 9, np.uint8)
    stack = stack_pictures([a, b])
    assert stack.shape == (5, 5, 3)
    assert (stack[:3] == 7).all()
    assert (stack[3:, :2] == 9).all()
    assert (stack[3:, 2:] == 255).all()


ODD = [[], [NAN], [INF, -INF], [1.0], [2.0, 2.0], [1e30, -1e30], [1e-12, 2e-12], [5.0, NAN, 6.0]]


@pytest.mark.parametrize("values", ODD, ids=str)
def test_odd_values_are_drawn_without_a_fault(values):
    assert draw_histogram({"a": values}).shape == (320, 900, 3)
    assert draw_scatter({"a": [(v, v) for v in values]}).shape == (560, 900, 3)
    assert draw_bars([Bar(label="", value=v, low=NAN, high=v) for v in values]).shape[1] == 900


def test_what_is_left_out_is_said():
    lost, whole = draw_histogram({"a": [1.0, 2.0, NAN]}), draw_histogram({"a": [1.0, 2.0]})
    assert coloured(lost[:30], ORANGE, 120).any()
    assert not coloured(whole[:30], ORANGE, 120).any()


@pytest.mark.parametrize("text", ["", "  ", "a" * 4000, "\u4e2d\u6587", "a\nb\tc", "\U0001f600"], ids=ascii)
def test_any_text_is_drawn_without_a_fault(text):
    picture = np.zeros((16, 16, 3), np.uint8)
    assert draw_number(picture, text).shape == (16, 16, 3)
    assert contact_sheet([Cell(picture=picture, text=text, label=text)], title=text[:50]).ndim == 3
    assert draw_table([text], [[text]], title=text[:50]).ndim == 3
    assert draw_bars([Bar(label=text, value=1.0)], title=text, label=text).shape[1] == 900
    assert draw_scatter({text: [(0, 1)], text + "2": [(1, 2)]}, title=text, x_label=text).shape == (560, 900, 3)


def test_intervals_lie_where_their_numbers_are():
    rows = [("one", [(0.5, 0.25, 0.75), None]), ("two", [(1.0, NAN, NAN), (0.0, 0.0, 0.5)])]
    picture = draw_intervals(rows, ["blue", "orange"], title="t")
    bare = draw_intervals([(name, [None, None]) for name, _ in rows], ["blue", "orange"], title="t")
    changed = (picture != bare).any(axis=2)
    assert changed.any()
    columns = np.flatnonzero(changed[52:90].any(axis=0))  # the first row holds one line only
    axis = np.flatnonzero(changed.any(axis=0))
    width = axis.max() - axis.min() - 10  # from 0 to 1, less the dots at both ends
    assert np.ptp(columns) == pytest.approx(width / 2, abs=6)
    assert draw_intervals([], ["a"]).ndim == draw_intervals([("x", [])], []).ndim == 3


def test_shares_fill_the_bar_in_their_proportion():
    picture = draw_shares([("row", [0.25, 0.0, 0.75])], ["a", "b", "c"], colours=(0, GREY, 1))
    line = picture[52 + 8]
    blue, orange = ((line == colour).all(axis=1).sum() for colour in ((38, 92, 196), (206, 84, 30)))
    assert orange / blue == pytest.approx(3, rel=0.05)
    assert draw_shares([], ["a"]).ndim == 3
