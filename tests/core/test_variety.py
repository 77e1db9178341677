"""Noise in the features: none where there shall be none, a picture's own, and no change of a token's size."""

import math

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling.latents import make_noise
from ernie_pack.ernie_core.sampling.variety import Variety, VarietyRun, vary_text, with_variety

WIDTH = 512


def features(batch=1, tokens=4):
    """Tokens of very different mean and deviation, as a text encoder gives them."""
    scales = torch.tensor([300.0, 1.0, 0.1, 5.0])[:tokens, None]
    return scales * (0.5 + torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(1)))


def noise(*seeds):
    return make_noise(seeds, 2, 3, 4)


def run(*seeds, **settings):
    return VarietyRun(Variety(**{"strength": 1.0} | settings), noise(*seeds))


@pytest.mark.parametrize(("settings", "sigma"), [({"strength": 0.0}, 1.0), ({}, 0.8), ({}, 0.1)])
def test_without_strength_and_from_the_end_of_the_range_the_features_are_the_same_object(settings, sigma):
    text = features()
    assert run(3, **settings).vary(text, sigma) is text


def test_the_amount_is_full_down_to_start_and_its_square_falls_linearly_to_end():
    variety = Variety(strength=2.0, start=0.9, end=0.5)
    amounts = [variety.amount(sigma) ** 2 for sigma in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.2)]
    assert amounts == pytest.approx([4, 4, 3, 2, 1, 0, 0])


def test_equal_start_and_end_are_an_edge():
    variety = Variety(strength=1.0, start=0.8, end=0.8)
    assert [variety.amount(sigma) for sigma in (0.81, 0.8)] == [1.0, 0.0]


def test_a_batch_is_its_pictures_one_by_one():
    text = features(batch=2)
    both = run(5, 6).vary(text, 0.95)
    alone = [run(seed).vary(text[i : i + 1], 0.95) for i, seed in enumerate((5, 6))]
    assert torch.equal(both, torch.cat(alone))


def test_one_row_of_features_serves_all_pictures_and_rows_repeat():
    one, two = features(), features(batch=2)
    assert torch.equal(run(5, 6).vary(one, 1.0), run(5, 6).vary(one.expand(2, -1, -1), 1.0))
    assert torch.equal(run(5, 6, 7).vary(two, 1.0)[2], run(7).vary(two[:1], 1.0)[0])


def test_seeds_differ_and_a_seed_repeats():
    text = features()
    assert torch.equal(run(5).vary(text, 1.0), run(5).vary(text, 1.0))
    assert not torch.allclose(run(5).vary(text, 1.0), run(6).vary(text, 1.0))


def test_the_noise_stays_the_same_over_the_levels_of_a_run():
    text, varied = features(), run(5, rescale=0.0, start=0.9, end=0.5)
    full, half = (varied.vary(text, sigma) - text for sigma in (1.0, 0.6))
    torch.testing.assert_close(half, full * 0.5, rtol=1e-3, atol=1e-3)


def test_rescale_1_keeps_mean_and_deviation_of_each_token():
    text = features()
    varied = run(5, strength=4.0).vary(text, 1.0)
    torch.testing.assert_close(varied.mean(-1), text.mean(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(varied.std(-1), text.std(-1), rtol=1e-4, atol=0)


def test_without_rescale_the_noise_adds_its_square():
    text = features()
    ratio = run(5, strength=2.0, rescale=0.0).vary(text, 1.0).std(-1) / text.std(-1)
    assert ratio[0, 1:].tolist() == pytest.approx([math.sqrt(5)] * 3, rel=0.1)


def test_the_first_token_stays():
    text = features()
    varied = run(5).vary(text, 1.0)
    assert torch.equal(varied[:, 0], text[:, 0])
    assert not torch.allclose(varied[:, 1], text[:, 1])


def test_a_token_that_is_one_number_stays_finite():
    text = torch.ones(1, 3, WIDTH)
    assert torch.equal(vary_text(text, torch.randn(1, 3, WIDTH), 1.0), text)


def test_a_run_without_noise_of_its_own_is_left_alone():
    text = features()
    assert VarietyRun(Variety(strength=1.0), torch.zeros(1, 2, 3, 4)).vary(text, 1.0) is text


def test_features_keep_their_type():
    assert run(5).vary(features().bfloat16(), 1.0).dtype == torch.bfloat16


def test_a_denoiser_follows_the_noise_level():
    text, seen = features(), []

    def make(text_BTD):
        seen.append(text_BTD)
        return lambda x, sigma: text_BTD.sum() + 0 * x

    varied = run(5)
    denoise = with_variety(make, text, varied)
    x = torch.zeros(1)
    levels = [1.0, 0.95, 0.85, 0.5, 0.2]
    assert [float(denoise(x, s)) for s in levels] == [float(varied.vary(text, s).sum()) for s in levels]
    assert len(seen) == 3
    assert seen[-1] is text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -0.1}, "strength must lie between 0 and 4"),
        ({"strength": 4.1}, "strength must lie between 0 and 4"),
        ({"strength": float("nan")}, "strength must lie between 0 and 4"),
        ({"rescale": 1.5}, "rescale must lie between 0 and 1"),
        ({"start": 0.5, "end": 0.8}, "start must not be below end"),
        ({"end": float("nan")}, "end must lie between 0 and 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ErnieError, match=message):
        Variety(**{"strength": 1.0} | settings)
