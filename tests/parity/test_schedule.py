"""Sigma grids and Euler steps against diffusers' FlowMatchEulerDiscreteScheduler with the released config."""

import pytest
import torch
from ernie_pack.ernie_core.sampling.samplers import sample_euler
from ernie_pack.ernie_core.sampling.schedule import NUM_TRAIN_TIMESTEPS, make_sigmas

pytestmark = pytest.mark.parity


def scheduler(shift, steps):
    """As the pipeline sets it up (scheduler_config.json, then set_timesteps with a plain grid)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    made = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift, use_dynamic_shifting=False)
    made.set_timesteps(sigmas=torch.linspace(1.0, 0.0, steps + 1)[:-1])
    return made


@pytest.mark.parametrize("shift", [4.0, 3.0, 1.0])
@pytest.mark.parametrize("steps", [1, 8, 20, 50])
def test_grids_are_the_schedulers(steps, shift):
    theirs = scheduler(shift, steps)
    ours = make_sigmas(steps, shift=shift)
    # theirs is reckoned in fp32, ours in fp64 and rounded once: at most two units in the last place apart
    torch.testing.assert_close(ours, theirs.sigmas, atol=1.3e-7, rtol=0)
    torch.testing.assert_close(ours[:-1] * NUM_TRAIN_TIMESTEPS, theirs.timesteps, atol=1.3e-4, rtol=0)


def test_euler_steps_are_the_schedulers():
    theirs = scheduler(4.0, 8)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 8, 4, 4, generator=generator)
    velocities = torch.randn(8, 2, 8, 4, 4, generator=generator)
    expected = start
    for t, v in zip(theirs.timesteps, velocities, strict=True):
        expected = theirs.step(v, t, expected).prev_sample
    remaining = iter(velocities)
    found = sample_euler(lambda x, sigma: next(remaining), start, make_sigmas(8))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
