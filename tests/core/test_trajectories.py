"""The teacher's way on the student's grid: a student that says what it is told arrives where the teacher does."""

from __future__ import annotations

import errno

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling.guidance import with_cfg
from ernie_pack.ernie_core.sampling.samplers import sample_euler
from ernie_pack.ernie_core.sampling.schedule import make_sigmas
from ernie_pack.ernie_core.training.teachers import TeacherTable, by_sigma
from ernie_pack.ernie_core.training.trajectories import (
    TrajectoryCache,
    fine_sigmas,
    state_at,
    teacher_velocities,
    trajectory_noise,
)

GRID = make_sigmas(8)
NOISE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) / 2


def curved(x, sigma):
    """A field whose paths bend, so that eight steps are not enough."""
    return torch.tanh(torch.einsum("cd,bdhw->bchw", WEIGHT, x)) * (1 + 3 * sigma)


def other(x, sigma):
    return x * sigma - 0.5


def test_one_substep_is_the_teacher_s_own_velocity_to_the_bit():
    velocities, x = teacher_velocities(curved, NOISE, GRID, substeps=1), NOISE
    for i in range(8):
        assert torch.equal(velocities[i], curved(x, float(GRID[i])))
        x = x + (float(GRID[i + 1]) - float(GRID[i])) * velocities[i]
    assert torch.equal(x, sample_euler(curved, NOISE, GRID))


@pytest.mark.parametrize("substeps", [1, 3, 6])
def test_a_student_that_regresses_perfectly_paints_the_teacher_s_picture_to_the_bit(substeps):
    velocities = teacher_velocities(with_cfg(curved, other, 4.0), NOISE, GRID, substeps=substeps)
    by_level = dict(zip(GRID.tolist(), velocities, strict=False))
    painted = sample_euler(lambda _, sigma: by_level[sigma], NOISE, GRID)
    assert torch.equal(painted, state_at(NOISE, velocities, GRID, 8))


def test_the_picture_is_that_of_the_fine_grid():
    velocities = teacher_velocities(curved, NOISE, GRID, substeps=5)
    fine = sample_euler(curved, NOISE, fine_sigmas(GRID, 5))
    torch.testing.assert_close(state_at(NOISE, velocities, GRID, 8), fine, rtol=1e-5, atol=1e-5)
    coarse = sample_euler(curved, NOISE, GRID)
    assert (coarse - fine).abs().max() > 1e-2  # or the test would show nothing


def test_the_target_is_the_slope_between_the_states():
    velocities = teacher_velocities(curved, NOISE, GRID, substeps=4)
    for i in range(8):
        here, there = state_at(NOISE, velocities, GRID, i), state_at(NOISE, velocities, GRID, i + 1)
        slope = (here - there) / (GRID[i] - GRID[i + 1])
        torch.testing.assert_close(velocities[i], slope, rtol=1e-4, atol=1e-4)
    assert torch.equal(state_at(NOISE, velocities, GRID, 0), NOISE)


def test_a_routed_teacher_is_followed_through_its_bands():
    table = TeacherTable(rules=by_sigma(("base", "base"), [0.7]), blend=0.0)
    assert table.weights(tag="", sigma=0.7, term="DM") == {"base": 1.0}

    def routed(x, sigma):
        return curved(x, sigma) if sigma > 0.7 else other(x, sigma)

    velocities = teacher_velocities(routed, NOISE, GRID, substeps=1)
    x = NOISE
    for i in range(8):
        x = state_at(NOISE, velocities, GRID, i)
        assert torch.equal(velocities[i], (curved if float(GRID[i]) > 0.7 else other)(x, float(GRID[i])))


@pytest.mark.parametrize("substeps", [1, 2, 7])
def test_a_finer_grid_holds_the_coarse_one(substeps):
    fine = fine_sigmas(GRID, substeps)
    assert len(fine) == 8 * substeps + 1
    assert torch.equal(fine[::substeps], GRID)
    assert (fine[1:] < fine[:-1]).all()


def test_impossible_requests_are_refused():
    with pytest.raises(ErnieError, match="substeps must be at least 1, got 0"):
        fine_sigmas(GRID, 0)
    with pytest.raises(ErnieError, match="velocity is not finite"):
        teacher_velocities(lambda x, _: x * float("nan"), NOISE, GRID, substeps=1)


def test_noise_is_a_function_of_prompt_and_turn():
    first = trajectory_noise((3, 4, 4), key="a", turn=0)
    assert torch.equal(first, trajectory_noise((3, 4, 4), key="a", turn=0))
    assert not torch.equal(first, trajectory_noise((3, 4, 4), key="a", turn=1))
    assert not torch.equal(first, trajectory_noise((3, 4, 4), key="b", turn=0))


def test_trajectories_are_kept_and_belong_to_their_teachers_grid_and_prompt(tmp_path):
    velocities = teacher_velocities(curved, NOISE, GRID, substeps=2)[:, 0]
    cache = TrajectoryCache(tmp_path, teachers="base cfg 4", sigmas=GRID, substeps=2)
    key = cache.key("a red star", 0)
    assert not cache.has(key)
    cache.keep(key, velocities)
    again = TrajectoryCache(tmp_path, teachers="base cfg 4", sigmas=GRID, substeps=2)
    assert again.key("a red star", 0) == key
    assert again.has(key)
    assert torch.equal(again.velocities(key), velocities)
    others = [
        again.key("a red star", 1),
        again.key("a blue star", 0),
        again.key("a red star", 0, "poster"),
        TrajectoryCache(tmp_path, teachers="base cfg 3", sigmas=GRID, substeps=2).key("a red star", 0),
        TrajectoryCache(tmp_path, teachers="base cfg 4", sigmas=make_sigmas(4), substeps=2).key("a red star", 0),
        TrajectoryCache(tmp_path, teachers="base cfg 4", sigmas=GRID, substeps=3).key("a red star", 0),
    ]
    assert not any(again.has(other) for other in others)


def test_a_damaged_entry_is_named_and_counts_as_missing(tmp_path):
    cache = TrajectoryCache(tmp_path, teachers="t", sigmas=GRID, substeps=1)
    key = cache.key("p", 0)
    with pytest.raises(ErnieError, match="teacher's trajectory is missing"):
        cache.velocities(key)
    cache.keep(key, torch.zeros(8, 3, 4, 4))
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-20])
    assert not cache.has(key)
    with pytest.raises(ErnieError, match="is damaged"):
        cache.velocities(key)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    import safetensors.torch

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    cache = TrajectoryCache(tmp_path, teachers="t", sigmas=GRID, substeps=1)
    with pytest.raises(ErnieError, match="full"):
        cache.keep(cache.key("p", 0), torch.zeros(8, 3, 4, 4))
    assert not list(tmp_path.rglob("*.safetensors*"))
