"""Sigma grids and samplers against diffusers' schedulers: Euler with the released config, the others on their grids."""

import pytest
import torch
from ernie_pack.ernie_core.sampling.samplers import sample_dpmpp_2m, sample_euler, sample_heun, sample_unipc
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


def integrate(theirs, start, velocity):
    """What a diffusers scheduler makes of a velocity field, step by step."""
    x = start
    for t, sigma in zip(theirs.timesteps, theirs.sigmas, strict=False):
        x = theirs.step(velocity(x, float(sigma)), t, x, return_dict=False)[0]
    return x


@pytest.fixture
def start():
    return torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))


def field(x, sigma):
    """A velocity that bends with x and with sigma."""
    return torch.tanh(x) * (1 + sigma) + sigma * x.flip(-1) - 0.3


def multistep(name, steps, shift):
    import diffusers

    made = getattr(diffusers, name)(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
    )
    made.set_timesteps(steps)
    return made


@pytest.mark.parametrize("shift", [1.0, 4.0])
@pytest.mark.parametrize("steps", [2, 3, 8, 20])
@pytest.mark.parametrize(
    ("sampler", "name"),
    [(sample_dpmpp_2m, "DPMSolverMultistepScheduler"), (sample_unipc, "UniPCMultistepScheduler")],
    ids=["dpmpp_2m", "unipc"],
)
def test_multistep_samplers_are_the_schedulers(sampler, name, steps, shift, start):
    theirs = multistep(name, steps, shift)
    assert float(theirs.sigmas[0]) < 1, "at 1 itself theirs divides by zero, ours does not"
    found = sampler(field, start, theirs.sigmas.double())
    torch.testing.assert_close(found, integrate(theirs, start, field), atol=2e-5, rtol=0)


@pytest.mark.parametrize("steps", [2, 8])
def test_heun_steps_are_the_schedulers(steps, start):
    from diffusers import FlowMatchHeunDiscreteScheduler

    theirs = FlowMatchHeunDiscreteScheduler(shift=4.0)
    theirs.set_timesteps(steps)
    found = sample_heun(field, start, torch.cat([theirs.sigmas[::2], theirs.sigmas[-1:]]))
    torch.testing.assert_close(found, integrate(theirs, start, field), atol=2e-5, rtol=0)
