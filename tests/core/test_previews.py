"""Loss curves and sample grids are pictures of the numbers they were given."""

import numpy as np
import pytest
from ernie_pack.ernie_core.training.previews import curve_panels, draw_curves, picture_grid, smooth


def test_the_average_of_a_constant_is_the_constant_from_the_start():
    assert [y for _, y in smooth([(i, 3.0) for i in range(9)])] == pytest.approx([3.0] * 9)


def test_the_average_follows_and_leaves_out_what_is_not_finite():
    points = [(0, 1.0), (1, float("nan")), (2, 3.0)]
    averaged = dict(smooth(points, span=3))
    assert averaged[0] == averaged[1] == 1.0
    assert averaged[2] == pytest.approx((0.5 * 1 + 3) / 1.5)


def ink_rows(picture, colour):
    """Mean row of a line of this colour, per column that has it."""
    hit = np.abs(picture.astype(int) - colour).sum(axis=2) < 40
    return {x: np.flatnonzero(hit[:, x]).mean() for x in range(hit.shape[1]) if hit[40:, x].any()}


def test_a_falling_loss_is_drawn_falling():
    picture = draw_curves({"loss": {"every step": [(i, 10.0 - i) for i in range(10)]}})
    assert picture.shape == (260, 900, 3)
    assert picture.dtype == np.uint8
    rows = ink_rows(picture[:, :740], (38, 92, 196))
    assert rows[max(rows)] > rows[min(rows)] + 80  # further down


@pytest.mark.parametrize(
    "values", [[], [(1, 0.0)], [(1, 2.0), (2, 2.0)], [(1, float("nan"))], [(1, 1e30), (2, -1e30)]], ids=str
)
def test_odd_curves_are_drawn_without_a_fault(values):
    assert draw_curves({"loss": {"line": values}}).shape == (260, 900, 3)


def test_a_run_of_nothing_has_a_panel_that_says_so():
    assert draw_curves(curve_panels([])).shape[0] >= 260


def test_noise_levels_are_listed_from_low_to_high():
    step = {"event": "step", "step": 1, "loss": 1, "loss_sigma_0.5_0.75": 1, "loss_sigma_0_0.25": 2}
    panels = curve_panels([step])
    assert list(panels["loss by noise level (average)"]) == ["sigma_0_0.25", "sigma_0.5_0.75"]


def test_preference_runs_show_the_winners_error():
    steps = [{"event": "step", "step": i, "loss": 1, "win_excess": -i, "lose_excess": i} for i in range(3)]
    panels = curve_panels(steps)
    title = next(t for t in panels if "winner must not rise" in t)
    assert panels[title]["winner"][-1][1] < 0 < panels[title]["loser"][-1][1]


def test_a_grid_holds_every_picture_at_its_place():
    pictures = [np.full((64, 64, 3), v, np.uint8) for v in (10, 90, 170)]
    grid = picture_grid({"first": pictures, "second": pictures[::-1]}, ["a", "b", "c"])
    assert grid.shape == (18 + 2 * (64 + 18), 3 * 64, 3)
    assert [int(grid[18 + 18 + 32, 64 * i + 32, 0]) for i in range(3)] == [10, 90, 170]
    assert [int(grid[18 + 82 + 18 + 32, 64 * i + 32, 0]) for i in range(3)] == [170, 90, 10]
