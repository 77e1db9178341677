"""Laws of editing by words, of inversion and of variations, on flows whose answer is known."""

from itertools import pairwise

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling.flow_edit import edit_by_inversion, flow_edit, invert, mix_gaussians, vary
from ernie_pack.ernie_core.sampling.latents import make_noise, step_noise
from ernie_pack.ernie_core.sampling.samplers import sample_euler
from ernie_pack.ernie_core.sampling.schedule import make_sigmas

X0 = make_noise([5, 6], 128, 3, 4)
SIGMAS = make_sigmas(12)


def draws():
    return step_noise([(7, 0), (7, 1)])


def point(mean):
    """The flow of a world that holds one picture only."""
    return lambda x, sigma: (x - mean) / sigma


def gaussian(x, sigma, variance=0.5):
    """The flow of pictures N(0, variance)."""
    keep = 1 - sigma
    return x * (sigma - keep * variance) / (keep**2 * variance + sigma**2)


def crooked(x, sigma):
    return torch.sin(x + sigma) - 0.3 * x.flip(-1)


def branches(source, target):
    return {"source": source, "target": target}


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("denoise", [0.3, 1.0])
def test_the_same_prompt_twice_gives_the_picture_back_bit_for_bit(repeats, denoise):
    edited = flow_edit(
        branches(crooked, crooked), X0, sigmas=make_sigmas(6, denoise=denoise), draw=draws(), repeats=repeats
    )
    assert torch.equal(edited, X0)


def test_an_edit_between_two_single_pictures_moves_by_their_difference():
    here, there = make_noise([1, 2], 128, 3, 4), make_noise([3, 4], 128, 3, 4)
    edited = flow_edit(branches(point(here), point(there)), X0, sigmas=SIGMAS, draw=draws())
    torch.testing.assert_close(edited, X0 + there - here, atol=1e-4, rtol=0)


def test_flow_edit_is_its_written_out_algorithm():
    draw, sigmas = draws(), SIGMAS.tolist()
    z = X0
    for sigma, after in pairwise(sigmas):
        noise = draw(X0)
        z_source = (1 - sigma) * X0 + sigma * noise
        z = z + (after - sigma) * (gaussian(z + z_source - X0, sigma, 2.0) - crooked(z_source, sigma))
    edited = flow_edit(branches(crooked, lambda x, sigma: gaussian(x, sigma, 2.0)), X0, sigmas=SIGMAS, draw=draws())
    torch.testing.assert_close(edited, z, atol=1e-4, rtol=1e-4)


def test_a_batch_is_its_pictures_one_by_one():
    both = branches(crooked, gaussian)
    edited = flow_edit(both, X0, sigmas=SIGMAS, draw=draws())
    for i in range(2):
        alone = flow_edit(both, X0[i : i + 1], sigmas=SIGMAS, draw=step_noise([(7, i)]))
        torch.testing.assert_close(edited[i : i + 1], alone)


def mask():
    area = torch.zeros(1, 1, 3, 4)
    area[..., 2:] = 1
    return area


@pytest.mark.parametrize(
    "run",
    [
        lambda **more: flow_edit(branches(crooked, gaussian), X0, sigmas=SIGMAS, draw=draws(), **more),
        lambda **more: edit_by_inversion(branches(crooked, gaussian), X0, sigmas=SIGMAS, **more),
        lambda **more: vary(branches(crooked, crooked), X0, sigmas=SIGMAS, draw=draws(), strength=0.5, **more),
    ],
)
def test_nothing_changes_outside_the_mask(run):
    edited = run(mask_BCHW=mask())
    assert torch.equal(edited[..., :2], X0[..., :2])
    assert (edited[..., 2:] - X0[..., 2:]).abs().mean() > 0.01


@pytest.mark.parametrize(
    ("run", "steps"),
    [
        (lambda **more: flow_edit(branches(crooked, gaussian), X0, sigmas=SIGMAS, draw=draws(), **more), 12),
        (lambda **more: edit_by_inversion(branches(crooked, gaussian), X0, sigmas=SIGMAS, **more), 24),
        (lambda **more: vary(branches(crooked, crooked), X0, sigmas=SIGMAS, draw=draws(), strength=1, **more), 24),
    ],
)
def test_every_step_is_told_once(run, steps):
    seen = []
    run(on_step=lambda step, steps, x, x0: seen.append((step, steps)))
    assert seen == [(i, steps) for i in range(steps)]


# --- inversion -------------------------------------------------------------------------------------------------------


def regained(steps, iterations, denoise=1.0):
    sigmas = make_sigmas(steps, denoise=denoise)
    noise = invert(gaussian, X0, sigmas, iterations=iterations)[0]
    return float((sample_euler(gaussian, noise, sigmas) - X0).abs().max())


def test_inversion_undoes_the_sampler():
    assert regained(20, 40) < 1e-4


def test_the_error_falls_with_the_iterations():
    errors = [regained(20, n) for n in (1, 2, 4, 8)]
    assert all(later < 0.6 * earlier for earlier, later in pairwise(errors)), errors


def test_one_iteration_is_of_first_order():
    coarse, fine = regained(100, 1), regained(200, 1)
    assert 1.7 < coarse / fine < 2.3


def test_inverted_noise_of_gaussian_pictures_is_white():
    pictures = 0.5**0.5 * make_noise(range(8), 128, 8, 8)
    noise = invert(gaussian, pictures, make_sigmas(200), iterations=4)[0]
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


def test_equal_prompts_give_the_picture_back_through_inversion():
    edited = edit_by_inversion(branches(gaussian, gaussian), X0, sigmas=SIGMAS, iterations=40)
    torch.testing.assert_close(edited, X0, atol=1e-4, rtol=0)


def test_the_model_is_never_asked_without_noise():
    asked = []

    def denoise(x, sigma):
        asked.append(sigma)
        return gaussian(x, sigma)

    invert(denoise, X0, SIGMAS, iterations=1)
    assert asked == pytest.approx(SIGMAS[:-1].flip(0).tolist())


# --- variations ------------------------------------------------------------------------------------------------------


def test_strength_0_is_the_picture_and_asks_no_model():
    assert torch.equal(vary({}, X0, sigmas=SIGMAS, draw=draws(), strength=0), X0)


def test_strength_1_is_a_fresh_picture():
    varied = vary({"source": gaussian}, X0, sigmas=SIGMAS, draw=draws(), strength=1)
    torch.testing.assert_close(varied, sample_euler(gaussian, draws()(X0), SIGMAS))


def test_a_variation_grows_with_its_strength():
    both = {"source": gaussian}
    sizes = [
        float((vary(both, X0, sigmas=SIGMAS, draw=draws(), strength=s, iterations=20) - X0).square().mean())
        for s in (0.01, 0.3, 0.6, 1.0)
    ]
    assert sizes[0] < 1e-3
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_mixed_noise_keeps_unit_variance(strength):
    first, second = make_noise([1], 128, 32, 32), make_noise([2], 128, 32, 32)
    mixed = mix_gaussians(first, second, strength)
    assert float(mixed.std()) == pytest.approx(1, abs=0.01)
    assert torch.equal(mix_gaussians(first, second, 0), first)
    assert torch.equal(mix_gaussians(first, second, 1), second)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ErnieError, match="repeats must be at least 1, got 0"):
        flow_edit(branches(crooked, crooked), X0, sigmas=SIGMAS, draw=draws(), repeats=0)
    with pytest.raises(ErnieError, match="iterations must be at least 1, got 0"):
        invert(crooked, X0, SIGMAS, iterations=0)
    with pytest.raises(ErnieError, match=r"strength must lie between 0 \(the picture as it is\) and 1, got 1.5"):
        mix_gaussians(X0, X0, 1.5)
    with pytest.raises(ErnieError, match="got nan"):
        mix_gaussians(X0, X0, float("nan"))


def test_an_edit_that_ends_in_nan_says_so():
    def broken(x, sigma):
        return x * float("nan")

    for run in (
        lambda: flow_edit(branches(crooked, broken), X0, sigmas=SIGMAS, draw=draws()),
        lambda: invert(broken, X0, SIGMAS),
        lambda: vary({"source": broken}, X0, sigmas=SIGMAS, draw=draws(), strength=0.5),
    ):
        with pytest.raises(ErnieError, match="ended in NaN"):
            run()
