"""Style by statistics: the reference's numbers at strength 1, nothing at 0, each picture by itself."""

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling.style import StyleStatistics, restyle, with_style


def latent(batch=1, rows=6, columns=5, *, seed=1, mean=0.0, std=1.0):
    return mean + std * torch.randn(batch, 128, rows, columns, generator=torch.Generator().manual_seed(seed))


REFERENCE = latent(rows=3, columns=7, seed=2, mean=0.7, std=1.8)


def style(reference=REFERENCE, **changes):
    return StyleStatistics.of(reference, **{"strength": 1.0} | changes)


def numbers(x):
    return x.mean((2, 3)), x.std((2, 3), correction=0)


def test_strength_1_gives_each_channel_the_references_mean_and_deviation():
    found = restyle(latent(2), style(), 0.9)
    for ours, wanted in zip(numbers(found), numbers(REFERENCE), strict=True):
        torch.testing.assert_close(ours, wanted.expand(2, -1), rtol=0, atol=1e-5)


def test_a_written_out_reference_channel_by_channel():
    x0, wanted = latent(), torch.empty(1, 128, 6, 5)
    for c in range(128):
        own, other = x0[0, c], REFERENCE[0, c]
        moved = (own - own.mean()) / own.std(correction=0) * other.std(correction=0) + other.mean()
        wanted[0, c] = 0.7 * own + 0.3 * moved
    torch.testing.assert_close(restyle(x0, style(strength=0.3), 0.9), wanted, rtol=1e-5, atol=1e-6)


def test_a_picture_with_the_references_statistics_stays():
    x0 = latent(seed=3)
    torch.testing.assert_close(restyle(x0, style(x0), 0.9), x0, rtol=0, atol=1e-6)
    mirrored = x0.flip(-1)  # other places, same statistics: the layout of the reference is not in them
    torch.testing.assert_close(restyle(x0, style(mirrored), 0.9), x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "sigma"),
    [
        ({"strength": 0.0}, 0.9),
        ({"start": 0.8, "end": 0.8}, 0.8),
        ({"start": 0.8, "end": 0.6}, 0.9),
        ({"start": 0.8, "end": 0.6}, 0.6),
    ],
)
def test_off_and_outside_of_the_range_the_estimate_is_the_same_object(changes, sigma):
    x0 = latent()
    assert restyle(x0, style(**changes), sigma) is x0


def test_the_range_holds_its_start_and_not_its_end():
    chosen = style(start=0.8, end=0.6)
    assert [chosen.acts_at(sigma) for sigma in (0.81, 0.8, 0.61, 0.6)] == [False, True, True, False]


def test_a_batch_is_its_pictures_one_by_one():
    both = torch.cat([latent(seed=4), latent(seed=5, mean=-2, std=0.3)])
    alone = torch.cat([restyle(one, style(strength=0.6), 0.9) for one in both.split(1)])
    torch.testing.assert_close(restyle(both, style(strength=0.6), 0.9), alone, rtol=0, atol=1e-6)


def test_constant_channels_take_the_mean_and_stay_finite():
    flat = torch.full((1, 128, 4, 4), 3.0)
    torch.testing.assert_close(restyle(flat, style(), 0.9), style().mean.expand(1, 128, 4, 4))
    torch.testing.assert_close(restyle(latent(), style(flat), 0.9), torch.full((1, 128, 6, 5), 3.0))
    assert restyle(torch.zeros(1, 128, 1, 1), style(), 0.9).isfinite().all()


def test_half_precision_comes_back_in_half_precision():
    assert restyle(latent().half(), style(), 0.9).dtype == torch.float16


def test_as_a_velocity_the_clean_estimate_is_moved():
    x, velocity, sigma = latent(seed=6), latent(seed=7), 0.75
    found = with_style(lambda x, sigma: velocity, [style(strength=0.4)])(x, sigma)
    wanted = restyle(x - sigma * velocity, style(strength=0.4), sigma)
    torch.testing.assert_close(x - sigma * found, wanted)


def test_without_an_acting_style_the_denoiser_is_untouched():
    velocity = latent()

    def denoise(x, sigma):
        return velocity

    assert with_style(denoise, [style(strength=0.0)]) is denoise
    assert with_style(denoise, [style()])(latent(), 0.3) is velocity


def test_several_act_one_after_the_other():
    x, first, second = latent(seed=6), style(strength=0.5), style(latent(seed=8), strength=0.5)
    found = with_style(lambda x, sigma: torch.zeros_like(x), [first, second])(x, 0.9)
    torch.testing.assert_close(x - 0.9 * found, restyle(restyle(x, first, 0.9), second, 0.9))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (torch.zeros(1, 16, 4, 4), r"a latent \[batch, 128"),
        (torch.full((1, 128, 4, 4), float("nan")), "finite numbers expected"),
        (torch.zeros(2, 128, 4, 4), "one reference picture expected, the latent holds 2"),
    ],
)
def test_a_bad_reference_is_named(reference, message):
    with pytest.raises(ErnieError, match=message):
        style(reference)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"strength": value}, "strength must lie between 0 and 1") for value in (-0.1, 1.1, float("nan"))),
        ({"start": 0.5, "end": 0.6}, "start must not be below end"),
        ({"end": float("nan")}, "end must lie between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ErnieError, match=message):
        style(**changes)


def test_bad_statistics_are_named():
    good = torch.ones(1, 128, 1, 1)
    with pytest.raises(ErnieError, match="mean must be finite numbers"):
        StyleStatistics(mean=torch.ones(128), std=good)
    with pytest.raises(ErnieError, match="std must be finite numbers"):
        StyleStatistics(mean=good, std=good * float("inf"))
    with pytest.raises(ErnieError, match="std must not be negative"):
        StyleStatistics(mean=good, std=-good)
