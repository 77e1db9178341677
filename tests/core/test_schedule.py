"""Sigma grids: the recorded ones, and their laws."""

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling.schedule import make_sigmas, shift_sigmas

TIMESTEPS_8 = {
    4.0: [1000, 965.517, 923.077, 869.565, 800, 705.882, 571.429, 363.636, 0],
    3.0: [1000, 954.545, 900, 833.333, 750, 642.857, 500, 300, 0],
}
# (steps, shift) -> first and last sigmas before the final 0
RECORDED = {
    (20, 4.0): ([1, 0.98701, 0.97297, 0.95775, 0.94118], [0.41379, 0.30769, 0.17391]),
    (20, 3.0): ([1, 0.98276, 0.96429], [0.34615, 0.25, 0.13636]),
    (50, 4.0): ([1, 0.99492, 0.98969], [0.20339, 0.14286, 0.07547]),
    (50, 3.0): ([1], [0.16071, 0.11111, 0.05769]),
}


@pytest.mark.parametrize("shift", TIMESTEPS_8)
def test_eight_steps_are_the_recorded_timesteps(shift):
    found = [round(t, 3) for t in (make_sigmas(8, shift=shift).double() * 1000).tolist()]
    assert found == pytest.approx(TIMESTEPS_8[shift], abs=1e-3)


@pytest.mark.parametrize(("steps", "shift"), RECORDED)
def test_longer_grids_begin_and_end_as_recorded(steps, shift):
    head, tail = RECORDED[steps, shift]
    grid = make_sigmas(steps, shift=shift).tolist()
    assert grid[: len(head)] == pytest.approx(head, abs=5e-6)
    assert grid[-1 - len(tail) : -1] == pytest.approx(tail, abs=5e-6)


def test_the_default_shift_is_the_official_4():
    assert torch.equal(make_sigmas(8), make_sigmas(8, shift=4.0))


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 4.0, 20.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 8, 50])
def test_a_grid_starts_at_1_ends_at_0_and_descends_strictly(steps, shift):
    grid = make_sigmas(steps, shift=shift)
    assert grid.shape == (steps + 1,)
    assert grid.dtype == torch.float32
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize("denoise", [0.1, 0.35, 0.5, 0.9])
def test_denoise_keeps_the_steps_and_starts_lower(denoise):
    grid = make_sigmas(10, denoise=denoise)
    assert grid.shape == (11,)
    assert 0 < grid[0] < 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_denoise_is_the_end_of_the_longer_grid():
    assert torch.equal(make_sigmas(10, denoise=0.5), make_sigmas(20)[-11:])
    assert torch.equal(make_sigmas(10, denoise=0.3), make_sigmas(33)[-11:])  # int(10 / 0.3), as the host does


def test_less_denoise_starts_lower():
    starts = [float(make_sigmas(10, denoise=d)[0]) for d in (1.0, 0.8, 0.5, 0.2)]
    assert starts == sorted(starts, reverse=True)


def test_denoise_0_asks_for_nothing():
    assert make_sigmas(10, denoise=0).numel() == 0


def test_shift_keeps_the_ends_and_shift_1_keeps_everything():
    grid = torch.linspace(1, 0, 11, dtype=torch.float64)
    assert torch.equal(shift_sigmas(grid, 1.0), grid)
    for shift in (0.5, 3.0, 4.0):
        assert shift_sigmas(grid, shift)[[0, -1]].tolist() == [1, 0]


def test_a_shift_and_its_inverse_cancel():
    grid = torch.linspace(1, 0, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_sigmas(shift_sigmas(grid, 4.0), 0.25), grid)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 8, "shift": 0.0}, r"shift must be above 0 .*got 0"),
        ({"steps": 8, "shift": float("nan")}, r"shift must be above 0 .*got nan"),
        ({"steps": 8, "denoise": 1.5}, r"denoise must lie between 0 .* and 1 .*got 1.5"),
        ({"steps": 8, "denoise": -0.1}, "got -0.1"),
    ],
)
def test_values_out_of_range_are_named(arguments, message):
    with pytest.raises(ErnieError, match=message):
        make_sigmas(**arguments)
