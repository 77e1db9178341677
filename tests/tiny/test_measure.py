"""The measurement agrees with what was drawn, noisy and soft pictures too, and says when there is nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from ernie_pack.tiny.measure import matches, measure
from ernie_pack.tiny.scenes import FACTS, all_scenes, draw
from PIL import Image, ImageFilter

ALL = all_scenes()


def accuracy(count: int, *, spoil=lambda picture, _: picture) -> dict[str, float]:
    """Share of `count` random scenes whose picture measures right, for each fact."""
    rng = np.random.default_rng(0)
    right = Counter()
    for index in rng.integers(len(ALL), size=count):
        scene = ALL[index]
        picture = spoil(draw(scene, rng), rng)
        right.update({fact: int(value) for fact, value in matches(scene, measure(picture)).items()})
    return {fact: right[fact] / count for fact in FACTS}


def blur_and_noise(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1)), dtype=np.float64)
    return np.clip((soft + rng.normal(0, 8, soft.shape)) / 255, 0, 1)


def test_drawn_scenes_measure_right():
    shares = accuracy(1000)
    assert min(shares.values()) >= 0.99, shares


def test_blurred_noisy_scenes_measure_right():
    shares = accuracy(250, spoil=blur_and_noise)
    assert min(shares.values()) >= 0.97, shares


def test_float_and_uint8_pictures_measure_the_same():
    picture = draw(ALL[4321], np.random.default_rng(0))
    assert measure(picture) == measure(picture.astype(np.float32) / 255)


def test_other_picture_sizes_measure_right():
    rng = np.random.default_rng(0)
    for scene in ALL[::400]:
        assert all(matches(scene, measure(draw(scene, rng, 256))).values()), scene


@pytest.mark.parametrize(
    "picture",
    [
        np.full((128, 128, 3), 200, np.uint8),
        np.broadcast_to(np.linspace(0.9, 0.4, 128)[:, None, None], (128, 128, 3)),
        np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8),
        np.full((128, 128, 3), np.nan),
    ],
    ids=["plain", "gradient", "noise", "nan"],
)
def test_a_picture_without_an_object_says_so(picture):
    measured = measure(picture)
    assert not measured.found
    assert (measured.shape, measured.color, measured.size, measured.place) == (None,) * 4
    assert not any(matches(ALL[0], measured)[fact] for fact in ("shape", "color", "size", "place"))


def test_only_the_largest_object_counts():
    picture = draw(ALL[0], np.random.default_rng(0)).copy()
    expected = measure(picture)
    picture[100:104, 100:104] = (252, 218, 40)
    assert measure(picture) == expected


def test_wrong_layout_is_refused():
    with pytest.raises(ValueError, match=r"must have the shape \[H, W, 3\], got \[3, 8, 8\]"):
        measure(np.zeros((3, 8, 8)))
