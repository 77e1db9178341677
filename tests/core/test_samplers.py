"""Samplers on oracle denoisers: formulas whose path is known."""

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.sampling.latents import mix_noise
from ernie_pack.ernie_core.sampling.samplers import sample_euler
from ernie_pack.ernie_core.sampling.schedule import make_sigmas


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 3, 3, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("shift", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 2, 8, 50])
def test_euler_lands_on_the_picture_when_the_path_is_straight(steps, shift, pair):
    x0, noise = pair
    out = sample_euler(lambda x, sigma: noise - x0, noise, make_sigmas(steps, shift=shift))
    torch.testing.assert_close(out, x0, atol=1e-5, rtol=0)


def test_euler_lands_on_the_picture_that_the_denoiser_sees(pair):
    """velocity = (x - x0) / sigma: what a network that knows x0 would predict from any point of the path."""
    x0, noise = pair
    out = sample_euler(lambda x, sigma: (x - x0) / sigma, noise, make_sigmas(8))
    torch.testing.assert_close(out, x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("denoise", [0.2, 0.7])
def test_euler_returns_to_the_picture_from_a_partial_start(denoise, pair):
    x0, noise = pair
    sigmas = make_sigmas(6, denoise=denoise)
    out = sample_euler(lambda x, sigma: noise - x0, mix_noise(x0, noise, float(sigmas[0])), sigmas)
    torch.testing.assert_close(out, x0, atol=1e-5, rtol=0)


def test_one_step_is_the_closed_form(pair):
    x, velocity = pair
    assert torch.equal(sample_euler(lambda *_: velocity, x, torch.tensor([1.0, 0.25])), x - 0.75 * velocity)


def test_euler_converges_at_first_order():
    """dx/dsigma = x from 1 to 0 shrinks x by e; halving the step halves the error."""

    def error(steps):
        x = sample_euler(lambda x, sigma: x, torch.ones(1), torch.linspace(1, 0, steps + 1))
        return abs(float(x) - float(torch.tensor(-1.0).exp()))

    assert error(20) / error(40) == pytest.approx(2, abs=0.1)


def test_the_denoiser_sees_every_sigma_but_the_last(pair):
    seen = []
    sigmas = make_sigmas(5)
    sample_euler(lambda x, sigma: seen.append(sigma) or torch.zeros_like(x), pair[0], sigmas)
    assert seen == sigmas[:-1].tolist()


def test_on_step_is_told_of_every_step_with_the_clean_estimate(pair):
    x0, noise = pair
    seen = []
    sample_euler(
        lambda x, sigma: (x - x0) / sigma,
        noise,
        make_sigmas(4),
        on_step=lambda i, n, x, clean: seen.append((i, n, clean)),
    )
    assert [(i, n) for i, n, _ in seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    for _, _, clean in seen:
        torch.testing.assert_close(clean, x0, atol=1e-5, rtol=0)


def test_on_step_may_stop_the_run(pair):
    def stop(step, steps, x, x0):
        if step == 2:
            raise Interrupted

    calls = []
    with pytest.raises(Interrupted):
        sample_euler(lambda x, s: calls.append(s) or x, pair[0], make_sigmas(10), on_step=stop)
    assert len(calls) == 3


def test_the_state_stays_fp32_whatever_the_model_computes_in(pair):
    seen = set()

    def denoise(x, sigma):
        seen.add(x.dtype)
        return torch.zeros_like(x).bfloat16()

    assert sample_euler(denoise, pair[0].bfloat16(), make_sigmas(3)).dtype == torch.float32
    assert seen == {torch.float32}


def test_the_start_is_left_alone(pair):
    before = pair[0].clone()
    sample_euler(lambda x, sigma: x, pair[0], make_sigmas(3))
    assert torch.equal(pair[0], before)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_prediction_is_an_error_with_advice(poison, pair):
    with pytest.raises(ErnieError, match=r"NaN or infinite values\. Look for NaN in the input latent, a broken LoRA"):
        sample_euler(lambda x, sigma: x * poison if sigma < 0.9 else x, pair[0], make_sigmas(8))


def test_a_broken_latent_is_an_error_with_advice(pair):
    pair[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(ErnieError, match="NaN or infinite"):
        sample_euler(lambda x, sigma: torch.zeros_like(x), pair[0], make_sigmas(2))
