"""Samplers on oracle denoisers: formulas whose path is known."""

import math

import pytest
import torch
from ernie_pack.ernie_core.config import SAMPLERS
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.sampling.latents import make_noise, mix_noise, step_noise
from ernie_pack.ernie_core.sampling.samplers import DETERMINISTIC, STOCHASTIC, Sampler, sample_euler
from ernie_pack.ernie_core.sampling.schedule import make_sigmas

MEAN, SPREAD = 0.7, 0.3  # of the Gaussian data below

every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def gaussian(x, sigma):
    """The velocity of data that is N(MEAN, SPREAD^2) in each number: x0 = E[data | x]."""
    alpha = 1 - sigma
    gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    return (x - (MEAN + gain * (x - alpha * MEAN))) / sigma


def gaussian_path(x, sigma, end):
    """Where the flow of `gaussian` carries x: it keeps (x - mean) / standard deviation."""
    spread, spread_end = (math.hypot((1 - s) * SPREAD, s) for s in (sigma, end))
    return (1 - end) * MEAN + (x - (1 - sigma) * MEAN) * spread_end / spread


def run(name, denoise, x, sigmas, eta=1.0, seed=0, **options):
    draw_noise = step_noise([(seed, place) for place in range(len(x))])
    return Sampler(name=name, eta=eta)(denoise, x, sigmas, draw_noise=draw_noise, **options)


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


@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_every_sampler_lands_on_the_picture_that_the_denoiser_sees(name, steps, pair):
    x0, noise = pair
    for sigmas in (make_sigmas(steps), make_sigmas(steps, denoise=0.5)):
        out = run(name, lambda x, sigma: (x - x0) / sigma, mix_noise(x0, noise, float(sigmas[0])), sigmas)
        torch.testing.assert_close(out, x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("steps", [1, 5])
def test_a_straight_path_is_followed_exactly(name, steps, pair):
    x0, noise = pair
    out = run(name, lambda x, sigma: noise - x0, noise, make_sigmas(steps))
    torch.testing.assert_close(out, x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2)])
def test_the_order_of_convergence_on_gaussian_data(name, order):
    """Halving the steps divides the error by 2 to the order (Richardson), against the closed form."""
    x = torch.linspace(-2, 2, 9)[:, None]

    def error(steps):
        found = run(name, gaussian, x, torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64))
        return float((found - gaussian_path(x, 0.9, 0.2)).abs().max())

    measured = math.log2(error(32) / error(64))
    assert order - 0.25 < measured < order + (0.25 if name == "euler" else 0.6)  # the corrector has part of a third


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "unipc"])
def test_higher_order_pays_on_the_whole_path(name):
    """From pure noise to the picture, both ends of which are singular in lambda: a quarter of Euler's error."""
    x = torch.linspace(-2, 2, 9)[:, None]

    def error(name):
        return float((run(name, gaussian, x, make_sigmas(80, shift=1.0)) - gaussian_path(x, 1.0, 0.0)).abs().max())

    assert error(name) < error("euler") / 4


@pytest.mark.parametrize("name", STOCHASTIC)
def test_eta_0_is_the_deterministic_sampler_bit_for_bit(name, pair):
    twin = {"euler_ancestral": "euler", "dpmpp_2m_sde": "dpmpp_2m"}[name]
    sigmas = make_sigmas(7)
    assert torch.equal(run(name, gaussian, pair[0], sigmas, eta=0.0), run(twin, gaussian, pair[0], sigmas))


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("eta", [1e-4, 0.5, 1.0])
@pytest.mark.parametrize("end", [0.5, 0.0])
def test_the_noise_level_of_gaussian_data_is_kept(name, eta, end):
    """Stopped half-way or at the end, mean and spread are those of the path, whatever share of noise is new; what is
    missing of the spread is of the order of the step."""
    noise = make_noise([1, 2, 3, 4], 50, 20, 20)
    wanted = math.hypot((1 - end) * SPREAD, end)

    def missing(steps):
        found = run(name, gaussian, noise, torch.linspace(1.0, end, steps + 1, dtype=torch.float64), eta=eta)
        assert float(found.mean()) == pytest.approx((1 - end) * MEAN, abs=0.01)
        return 1 - float(found.std()) / wanted

    assert abs(missing(80)) < 0.065
    assert abs(missing(160)) < 0.65 * abs(missing(80)) + 0.004  # 80,000 numbers: their own spread


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_picture_depends_on_its_own_seed_alone(name, pair):
    """Whoever stands beside it, and the same at each place that it was drawn with."""
    sigmas = make_sigmas(5)
    sampler = Sampler(name=name)
    both = sampler(gaussian, pair[0], sigmas, draw_noise=step_noise([(7, 0), (7, 1)]))
    for i in range(2):
        alone = sampler(gaussian, pair[0][i : i + 1], sigmas, draw_noise=step_noise([(7, i)]))
        assert torch.equal(alone[0], both[i])
    other = sampler(gaussian, pair[0], sigmas, draw_noise=step_noise([(8, 0), (7, 1)]))
    assert not torch.equal(other[0], both[0])
    assert torch.equal(other[1], both[1])


def test_new_noise_is_not_the_noise_of_the_start():
    start = make_noise([5], 4, 8, 8)
    draw = step_noise([(5, 0)])
    drawn = [draw(start) for _ in range(3)]
    for i, a in enumerate([start, *drawn]):
        for b in drawn[i:]:
            assert abs(float((a * b).mean())) < 0.25


@every_sampler
@pytest.mark.parametrize(
    "grid", [[1.0, 1.0, 0.5, 0.0], [0.8, 0.5, 0.5, 0.2, 0.0], [0.9, 0.4], [0.2, 0.6, 0.9], [1.0, 0.3, 0.0], [0.5]]
)
def test_any_grid_gives_finite_numbers(name, grid, pair):
    """Repeated, ascending, single and no steps; ends at and away from 0 and 1."""
    found = run(name, gaussian, pair[0], torch.tensor(grid))
    assert found.isfinite().all()
    if len(grid) == 1:
        assert torch.equal(found, pair[0])


@every_sampler
@pytest.mark.parametrize("grid", [[1.0, 0.7, 0.4, 0.0], [0.9, 0.7, 0.3], [0.6, 0.0]])
def test_on_step_counts_the_calls_of_the_model(name, grid, pair):
    seen, told = [], []

    def denoise(x, sigma):
        assert sigma > 0, "at sigma 0 there is nothing to ask"
        seen.append(x)
        return gaussian(x, sigma)

    sigmas = torch.tensor(grid)
    run(name, denoise, pair[0], sigmas, on_step=lambda call, calls, x, x0: told.append((call, calls, x)))
    calls = Sampler(name=name).calls(sigmas)
    assert [(call, total) for call, total, _ in told] == [(i, calls) for i in range(calls)]
    assert len(seen) == calls
    assert all(x is asked for (_, _, x), asked in zip(told, seen, strict=True))


@every_sampler
def test_every_sampler_keeps_fp32_leaves_the_start_alone_and_finds_nan(name, pair):
    before = pair[0].clone()
    assert run(name, lambda x, s: gaussian(x, s).bfloat16(), pair[0], make_sigmas(3)).dtype == torch.float32
    assert torch.equal(pair[0], before)
    with pytest.raises(ErnieError, match="NaN or infinite"):
        run(name, lambda x, s: x * float("nan"), pair[0], make_sigmas(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ddim"}, "sampler euler, heun, dpmpp_2m, unipc, euler_ancestral, dpmpp_2m_sde expected, got 'ddim'"),
        ({"eta": 1.5}, "eta must lie between 0"),
        ({"eta": float("nan")}, "eta must lie between 0"),
    ],
)
def test_an_unknown_sampler_or_share_is_an_error(settings, message):
    with pytest.raises(ErnieError, match=message):
        Sampler(**settings)


def test_the_list_of_names_is_that_of_the_functions():
    assert (*DETERMINISTIC, *STOCHASTIC) == SAMPLERS
