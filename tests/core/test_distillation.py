"""Distribution matching: the mathematics against formulas written out, and a toy whose scores are known."""

import math
import re
from dataclasses import asdict

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling.schedule import make_sigmas
from ernie_pack.ernie_core.training.distillation import (
    DistilConfig,
    FakeConfig,
    Health,
    cfg_of_extra,
    clean_estimate,
    direction,
    guidance,
    matching_health,
    matching_loss,
    normaliser,
)
from ernie_pack.ernie_core.training.objectives import SigmaSampling


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_direction_is_the_fake_clean_estimate_minus_the_real_one():
    x, real, fake = (randn(3, 4, 2, 2, seed=s) for s in range(3))
    sigmas = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = clean_estimate(x, fake, sigmas) - clean_estimate(x, real, sigmas)
    assert torch.allclose(direction(real, fake, sigmas), expected, atol=1e-12)


def test_the_gradient_is_the_formula_and_not_that_of_the_scores():
    x = randn(2, 4, 3, 3).requires_grad_()
    push = randn(2, 4, 3, 3, seed=1)
    matching_loss(x, push).sum().backward()
    assert torch.allclose(x.grad, push / push[0].numel(), atol=1e-15)


def test_equal_scores_without_guidance_leave_the_student_alone():
    x, v = randn(2, 4, 3, 3).requires_grad_(), randn(2, 4, 3, 3, seed=1)
    sigmas = torch.tensor([0.3, 0.8], dtype=torch.float64)
    real = v + guidance(v, randn(2, 4, 3, 3, seed=2), 1.0)
    matching_loss(x, direction(real, v, sigmas)).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_the_extra_form_of_guidance_is_one_more():
    cond, uncond = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    usual = uncond + cfg_of_extra(3.5) * (cond - uncond)
    assert cfg_of_extra(3.5) == 4.5
    assert torch.allclose(cond + 3.5 * (cond - uncond), usual)
    assert torch.allclose(cond + guidance(cond, uncond, 4.5), usual)


def test_the_normaliser_is_each_samples_own_and_has_a_floor():
    x, real = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    real[1] = x[1] + 1e-4
    scale = normaliser(x, real, 0.05)
    assert scale.shape == (2, 1, 1, 1)
    assert scale.flatten().tolist() == pytest.approx([float((x[0] - real[0]).abs().mean()), 0.05])


def test_health_says_whether_the_pull_is_the_teachers():
    x, real = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    known = matching_health(x, real, x)  # the fake score knows the student
    assert known["dm_cos"].tolist() == pytest.approx([1, 1])
    assert known["dm_mag_ratio"].tolist() == pytest.approx([1, 1])
    met = matching_health(x, real, real + 1e-3 * (x - real))
    assert met["dm_mag_ratio"].tolist() == pytest.approx([1e-3, 1e-3])
    lost = matching_health(x, real, 2 * real - x)
    assert lost["dm_cos"].tolist() == pytest.approx([-1, -1])
    assert known["x_std"].tolist() == pytest.approx(x.flatten(1).std(1).tolist())


# --- a toy: one number, scores known ------------------------------------------------------------------------


def mixture_velocity(x, sigma, means, std):
    """The exact velocity E[noise - x0 | x_sigma] of a mixture of equal Gaussians at `means`."""
    mean, variance = (1 - sigma) * means, (1 - sigma) ** 2 * std**2 + sigma**2
    logits = -((x[:, None] - mean) ** 2) / (2 * variance)
    share = torch.softmax(logits, dim=1)
    x0 = means + (1 - sigma) * std**2 / variance * (x[:, None] - mean)
    return (x - (share * x0).sum(1)) / sigma


def train_toy(sign, steps=300):
    """A one-step generator a z + b under the exact scores of a target N(2, 0.5^2) and of its own Gaussian."""
    a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    optimiser = torch.optim.SGD([a, b], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = (a * torch.randn(512, generator=generator) + b).view(-1, 1, 1, 1)
        sigma = 0.02 + 0.96 * float(torch.rand((), generator=generator))
        noisy = ((1 - sigma) * x + sigma * torch.randn(x.shape, generator=generator)).detach().flatten()
        real = mixture_velocity(noisy, sigma, torch.tensor([2.0]), 0.5)
        fake = mixture_velocity(noisy, sigma, b.detach()[None], float(a.detach().abs()))
        sigmas = torch.full((512,), sigma)
        push = sign * direction(real.view_as(x), fake.view_as(x), sigmas)
        optimiser.zero_grad()
        matching_loss(x, push).mean().backward()
        optimiser.step()
    return float(a.detach().abs()), float(b.detach())


def test_matching_moves_a_generator_onto_its_target():
    std, mean = train_toy(1)
    assert mean == pytest.approx(2, abs=0.1)
    assert std == pytest.approx(0.5, abs=0.1)


def test_a_slip_of_the_sign_drives_it_away():
    _, mean = train_toy(-1, steps=60)
    assert mean < -2


def test_matching_covers_both_modes_of_a_mixture():
    """Particles in the place of a generator; their own score by a kernel estimate, exact for that set."""
    generator = torch.Generator().manual_seed(0)
    means, std, width = torch.tensor([-2.0, 2.0]), 0.3, 0.25
    x = torch.randn(256, generator=generator)
    for _ in range(400):
        sigma = 0.1 + 0.8 * float(torch.rand((), generator=generator))
        noisy = (1 - sigma) * x + sigma * torch.randn(256, generator=generator)
        real, fake = mixture_velocity(noisy, sigma, means, std), mixture_velocity(noisy, sigma, x, width)
        x = x - 0.2 * direction(real, fake, torch.full((256,), sigma))
    assert 0.3 < float((x > 0).float().mean()) < 0.7
    assert float((x.abs() - 2).abs().mean()) < 0.4


# --- the stop rule ------------------------------------------------------------------------------------------

WELL = {"x_std": 1.0, "dm_cos": 0.5, "fake_fresh": 0.2, "fake_seen": 0.2}


def alarms(health, count, **changes):
    return [a for _ in range(count) if (a := health.update({**WELL, **changes}, patience=20))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_std": 0.3}, "contrast is 0.[0-9]+ of what it was at the start"),
        ({"x_std": 2.0}, "contrast is 1.[0-9]+ of what it was at the start"),
        ({"fake_fresh": 0.6}, "lags behind"),
        ({"dm_cos": -0.5}, "does not point towards the teachers"),
    ],
)
def test_ill_health_that_lasts_is_said_once_and_short_trouble_is_not(changes, message):
    health = Health()
    assert not alarms(health, 50)
    assert not alarms(health, 3, **changes)
    assert not alarms(health, 60)
    (alarm,) = alarms(health, 100, **changes)
    assert re.search(message, alarm)
    assert "for 20 steps" in alarm


def test_health_resumes_where_it_was():
    whole, first = Health(), Health()
    assert not alarms(whole, 30) + alarms(first, 30)
    second = Health(**asdict(first))
    for health in (whole, second):
        alarms(health, 5, dm_cos=-1.0)
    assert whole == second


# --- settings -----------------------------------------------------------------------------------------------


def test_the_grid_is_the_samplers():
    assert torch.equal(DistilConfig().grid(), make_sigmas(8, shift=4.0))
    assert DistilConfig(sigmas=(1.0, 0.75, 0.0)).grid().tolist() == [1, 0.75, 0]


def test_every_step_of_the_grid_is_chosen_as_often():
    config = DistilConfig(steps=4)
    chosen = [config.chosen_step(seed=3, step=step) for step in range(12)]
    assert [sorted(chosen[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert chosen != sorted(chosen)
    anchored = DistilConfig(steps=4, anchor_weight=0.05)
    assert sorted(anchored.chosen_step(seed=3, step=step) for step in range(3)) == [1, 2, 3]
    for gradient in ("last", "all"):
        assert {DistilConfig(gradient=gradient).chosen_step(seed=0, step=s) for s in range(20)} == {7}


def test_the_fake_score_warms_up_for_whole_steps():
    assert FakeConfig(warmup=100).warmup_steps == 20
    assert FakeConfig(warmup=11, steps_per_student=5).warmup_steps == math.ceil(11 / 5)
    assert FakeConfig(warmup=0).warmup_steps == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigmas": (0.9, 0.0)}, "must fall from 1 to 0"),
        ({"sigmas": (1.0, 0.5, 0.5, 0.0)}, "must fall from 1 to 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"shift": 0.0}, "shift must be above 0"),
        ({"shift": math.nan}, "shift must be above 0"),
        ({"cfg": -1.0}, "cfg must be 0 or more"),
        ({"trajectory_steps": -1}, "trajectory_steps must be at least 0"),
        ({"trajectory_substeps": 0}, "trajectory_substeps must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"floor": 0.0}, "floor must be above 0"),
        ({"noise": SigmaSampling(kind="uniform", shift=1.0)}, "noise.low must be above 0"),
        ({"noise": SigmaSampling(kind="weighted", low=0.02)}, "weighted"),
        ({"anchor_weight": -0.1}, "anchor_weight must be 0"),
        ({"anchor_weight": 0.05, "anchor_steps": 12}, "between 1 and anchor_of - 1 = 11"),
        ({"anchor_weight": 0.05, "steps": 1}, "takes the first step for itself"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ErnieError, match=message):
        DistilConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"steps_per_student": 0}, "steps_per_student must be at least 1"),
        ({"warmup": -1}, "warmup must be 0"),
    ],
)
def test_impossible_settings_of_the_fake_score_are_named(settings, message):
    with pytest.raises(ErnieError, match=message):
        FakeConfig(**settings)
