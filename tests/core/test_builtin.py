"""The weights-free scorer: right on cases worked out by hand, and falling under every obvious degradation."""

import itertools

import numpy as np
import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring.builtin import (
    MEASURES,
    WEIGHTS,
    BuiltinScorer,
    blur_effect,
    combine,
    hasler_suesstrunk,
    measure_picture,
    noise_sigma,
)
from PIL import Image, ImageDraw, ImageFilter


def scene(seed):
    """Shaded discs on a gradient: smooth parts, edges, colours, mid-tones."""
    rng = np.random.default_rng(seed)
    side = 256
    y, x = np.mgrid[:side, :side] / side
    phase = rng.uniform(0, 6, 3)
    ground = np.stack([110 + 50 * np.sin(4 * x + 3 * y + p) for p in phase], -1)
    image = Image.fromarray(ground.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(40):
        left, top, size = (int(v) for v in rng.integers(0, (side, side, 60)))
        pen.ellipse((left, top, left + size, top + size), fill=tuple(int(v) for v in rng.integers(30, 220, 3)))
    return np.asarray(image)


def page(size=20):
    image = Image.new("RGB", (320, 256), (235, 235, 225))
    pen = ImageDraw.Draw(image)
    for i in range(8):
        pen.text((8, 6 + i * 30), "The quick brown fox jumps", fill=(20, 20, 40), font_size=size)
    return np.asarray(image)


def blurred(picture, sigma):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))


def noisy(picture, sigma):
    noise = np.random.default_rng(5).normal(0, sigma, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


def brighter(picture, gain):
    return (picture * float(gain)).clip(0, 255).astype(np.uint8)


def falls(measure, pictures, *, least=0.0):
    values = [measure_picture(p, measure) for p in pictures]
    assert all(a >= b - 0.01 for a, b in itertools.pairwise(values)), values
    assert values[0] - values[-1] > least, values


PICTURES = [scene(0), scene(1), page()]


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("measure", ["sharpness", "combined"])
def test_blur_lowers_it(picture, measure):
    falls(measure, [picture, *(blurred(picture, s) for s in (1, 2, 4))], least=15)


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("measure", ["cleanliness", "combined"])
def test_noise_lowers_it(picture, measure):
    falls(measure, [picture, *(noisy(picture, s) for s in (4, 8, 16, 32))], least=15)


@pytest.mark.parametrize("picture", PICTURES)
def test_noise_is_no_detail(picture):
    """On a blurred picture noise must not pass for detail."""
    soft = blurred(picture, 3)
    for sigma in (6, 12, 24):
        assert measure_picture(noisy(soft, sigma), "sharpness") < 0.5 * measure_picture(picture, "sharpness")
        assert measure_picture(noisy(soft, sigma), "combined") < measure_picture(soft, "combined")


@pytest.mark.parametrize("picture", PICTURES[:2])
@pytest.mark.parametrize("measure", ["exposure", "combined"])
def test_over_and_under_exposure_lower_it(picture, measure):
    falls(measure, [picture, *(brighter(picture, g) for g in (1.8, 2.6, 4, 8))], least=15)
    falls(measure, [picture, *(brighter(picture, g) for g in (0.5, 0.25, 0.1))], least=15)


@pytest.mark.parametrize("picture", PICTURES)
def test_less_contrast_and_colour(picture):
    flat = [(128 + (picture - 128.0) * f).astype(np.uint8) for f in (1, 0.6, 0.3, 0.1)]
    falls("contrast", flat, least=5)
    falls("text_legibility", flat, least=5)
    luma = picture @ np.array([0.299, 0.587, 0.114])
    grey = [(picture * f + luma[..., None] * (1 - f)).clip(0, 255).astype(np.uint8) for f in (1, 0.6, 0.3, 0)]
    falls("colourfulness", grey, least=3)


def test_text_that_is_harder_to_read():
    text = page()
    falls("text_legibility", [text, *(blurred(text, s) for s in (0.7, 1.5, 3))], least=15)
    falls("text_legibility", [text, *(noisy(text, s) for s in (16, 32, 64))], least=15)
    assert measure_picture(noisy(np.full((256, 256, 3), 128, np.uint8), 30), "text_legibility") < 5
    ramp = np.repeat(np.linspace(0, 255, 256)[None, :, None], 256, 0).repeat(3, 2).astype(np.uint8)
    assert measure_picture(ramp, "text_legibility") < 5


def test_colourfulness_by_hand():
    """Half pure red, half pure blue: rg = 255 or 0, yb = 127.5 or -255."""
    half = np.zeros((8, 8, 3))
    half[:, :4, 0] = half[:, 4:, 2] = 255
    sigma = np.hypot(127.5, 191.25)
    mean = np.hypot(127.5, -63.75)
    assert hasler_suesstrunk(half) == pytest.approx(sigma + 0.3 * mean)
    assert hasler_suesstrunk(np.full((4, 4, 3), 77.0)) == 0


def test_the_noise_that_was_added_is_found():
    rng = np.random.default_rng(3)
    ramp = np.linspace(40, 200, 200)[None].repeat(200, 0)
    for sigma in (2.0, 5.0, 20.0):
        found = noise_sigma((ramp + rng.normal(0, sigma, ramp.shape)).astype(np.float32))
        assert found == pytest.approx(sigma, rel=0.05)
    assert noise_sigma(ramp.astype(np.float32)) < 1e-3


def test_the_blur_effect_of_an_ideal_edge_and_of_nothing():
    edge = np.zeros((30, 30), np.float32)
    edge[:, 15:] = 200
    # one step of 200 becomes nine of 200 / 9: 1/9 of it is left at the step
    assert blur_effect(np.maximum(edge, edge.T)) == pytest.approx(1 / 9, abs=1e-6)
    assert blur_effect(np.full((30, 30), 9.0, np.float32)) == 1
    assert blur_effect(np.zeros((3, 3), np.float32)) == 1


def test_exposure_and_contrast_by_hand():
    grey = np.full((64, 64, 3), 127.5).astype(np.uint8)
    assert measure_picture(grey, "exposure") == pytest.approx(100, abs=0.1)
    assert measure_picture(np.full((64, 64, 3), 255, np.uint8), "exposure") == 0
    half = np.zeros((64, 64, 3), np.uint8)
    half[:32] = 255
    assert measure_picture(half, "contrast") == pytest.approx(100)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (5, 5), (31, 33), (40, 4100)])
def test_every_size_and_the_range(measure, shape):
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert 0 <= measure_picture(picture, measure) <= 100
    assert 0 <= measure_picture(np.zeros((*shape, 3), np.uint8), measure) <= 100


def test_combined_is_the_weighted_mean_and_the_scorer_gives_it():
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert combine(dict.fromkeys(WEIGHTS, 100.0)) == pytest.approx(100)
    assert combine(dict.fromkeys(WEIGHTS, 0.0)) == pytest.approx(0)
    scorer = BuiltinScorer()
    assert scorer.score(iter(PICTURES), batch_size=2) == [measure_picture(p, "combined") for p in PICTURES]
    with pytest.raises(ErnieError, match="measure must be one of"):
        BuiltinScorer(measure="beauty")
