"""Hard inpainting: what the walk leaves alone, where it ends up, what it costs."""

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling.langevin import InnerIterations, walk, with_inner_iterations
from ernie_pack.ernie_core.sampling.masks import hold_outside
from ernie_pack.ernie_core.sampling.samplers import sample_euler
from ernie_pack.ernie_core.sampling.schedule import make_sigmas

RHO = 0.9
MASK = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)


def gaussian(x, sigma):
    """The exact velocity when pictures are pairs of normal numbers with correlation RHO."""
    covariance = torch.tensor([[1, RHO], [RHO, 1]], dtype=x.dtype)
    noisy = (1 - sigma) ** 2 * covariance + sigma**2 * torch.eye(2, dtype=x.dtype)
    x0 = x @ ((1 - sigma) * covariance @ torch.linalg.inv(noisy)).T
    return (x - x0) / sigma


def start(count=1, value=2.0):
    return torch.full((count, 1, 1, 2), value)


def test_the_walk_draws_from_the_noisy_pair_given_the_evidence():
    """Without push-back, long and slow: the inside is what the model believes beside a noisy `start`."""
    sigma, count = 0.5, 20_000
    how = InnerIterations(iterations=100, evidence=0.0, step=0.1)
    generator = torch.Generator().manual_seed(0)
    x = walk(
        gaussian,
        torch.randn(count, 1, 1, 2, generator=generator),
        sigma,
        mask_B1HW=MASK,
        start_BCHW=start(count),
        how=how,
        generator=generator,
    )
    inside, outside = x[..., 0].flatten(), x[..., 1].flatten()
    assert outside.mean() == pytest.approx((1 - sigma) * 2.0, abs=0.02)
    assert outside.std() == pytest.approx(sigma, abs=0.02)
    variance = (1 - sigma) ** 2 + sigma**2
    slope = (1 - sigma) ** 2 * RHO / variance  # of the inside on the outside, in the noisy pair
    assert inside.mean() == pytest.approx(slope * (1 - sigma) * 2.0, abs=0.03)


def test_push_back_brings_the_inside_nearer_to_what_belongs_to_the_evidence():
    """The pair's own rule says inside = RHO * 2 = 1.8; plain masking misses it, the walk comes closer."""

    def paint(how):
        count = 4000
        noise = torch.randn(count, 1, 1, 2, generator=torch.Generator().manual_seed(1))
        masked = hold_outside(gaussian, MASK, start(count), noise)
        denoise = with_inner_iterations(gaussian, masked, mask_B1HW=MASK, start_BCHW=start(count), how=how)
        return sample_euler(denoise, noise.clone(), make_sigmas(8))[..., 0].mean()

    plain, walked = (paint(InnerIterations(iterations=n, evidence=2.0)) for n in (0, 5))
    assert abs(walked - RHO * 2) < 0.5 * abs(plain - RHO * 2)


def test_any_step_and_evidence_stays_finite():
    for step in (0.01, 1.0, 5.0):
        for evidence in (0.0, 20.0):
            x = walk(
                gaussian,
                torch.randn(8, 1, 1, 2),
                0.7,
                mask_B1HW=MASK,
                start_BCHW=start(8),
                how=InnerIterations(iterations=100, evidence=evidence, step=step),
                generator=torch.Generator().manual_seed(0),
            )
            assert x.abs().max() < 100, (step, evidence)


def sampled(how, mask=MASK, count_calls=None):
    noise = torch.randn(3, 1, 1, 2, generator=torch.Generator().manual_seed(2))

    def denoise(x, sigma):
        if count_calls is not None:
            count_calls.append(sigma)
        return gaussian(x, sigma)

    masked = hold_outside(denoise, mask, start(3), noise)
    if how is not None:
        masked = with_inner_iterations(denoise, masked, mask_B1HW=mask, start_BCHW=start(3), how=how)
    return sample_euler(masked, noise.clone(), make_sigmas(5))


@pytest.mark.parametrize(
    "how",
    [InnerIterations(iterations=0), InnerIterations(iterations=4, start=0.5, end=0.5)],
    ids=["no iterations", "an empty range"],
)
def test_neutral_settings_are_plain_masking_bit_for_bit(how):
    assert how.is_neutral
    assert torch.equal(sampled(how), sampled(None))


def test_with_nothing_outside_it_is_plain_sampling_bit_for_bit():
    ones = torch.ones(1, 1, 1, 2)
    plain = sample_euler(gaussian, torch.randn(3, 1, 1, 2, generator=torch.Generator().manual_seed(2)), make_sigmas(5))
    assert torch.equal(sampled(InnerIterations(iterations=4), mask=ones), plain)


def test_the_outside_comes_back_as_it_was():
    painted = sampled(InnerIterations(iterations=4))
    torch.testing.assert_close(painted[..., 1], start(3)[..., 1], rtol=0, atol=1e-5)


def test_each_iteration_is_one_model_call_in_the_range_only():
    calls = []
    sampled(InnerIterations(iterations=3, start=0.95, end=0.6), count_calls=calls)
    levels = make_sigmas(5)[:-1].tolist()
    assert len(calls) == len(levels) + 3 * sum(0.6 < s <= 0.95 for s in levels)


def test_the_seed_decides_the_walk():
    first, again, other = (sampled(InnerIterations(iterations=3, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_the_walk_leaves_its_argument_alone():
    x = torch.randn(1, 1, 1, 2)
    before = x.clone()
    how = InnerIterations(iterations=2)
    walk(gaussian, x, 0.5, mask_B1HW=MASK, start_BCHW=start(), how=how, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": -1}, "iterations must lie between 0 and 100"),
        ({"iterations": 1, "evidence": float("nan")}, "evidence must lie between 0 and 20"),
        ({"iterations": 1, "step": 0.0}, "step must lie between 0.01 and 5"),
        ({"iterations": 1, "start": 0.2, "end": 0.5}, "start must not be below end"),
    ],
)
def test_wrong_settings_say_so(settings, message):
    with pytest.raises(ErnieError, match=message):
        InnerIterations(**settings)
