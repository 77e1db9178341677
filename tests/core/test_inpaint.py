"""Cutting out, masking, filling, colours, and laying back: what is outside the mask never changes."""

import logging

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling.inpaint import COLOUR_MATCHES, FILLS, lay_back, match_colour, prepare
from ernie_pack.ernie_core.sampling.masks import grow


def picture(height=64, width=96, batch=1):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(0))


def square(height=64, width=96, top=20, left=40, side=10):
    mask = torch.zeros(1, height, width)
    mask[:, top : top + side, left : left + side] = 1
    return mask


def painted_like(prepared, seed=1):
    return torch.rand(prepared.image.shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "whole": ({}, 64, 96),
    "feathered": ({"grow_px": 3, "feather_px": 9}, 64, 96),
    "cut out": ({"context_px": 8, "feather_px": 4}, 64, 96),
    "cut out, larger": ({"context_px": 8, "size_px": 96}, 64, 96),
    "cut out, smaller": ({"context_px": 30, "size_px": 16}, 64, 96),
    "odd sizes": ({"context_px": 4}, 61, 83),
    "odd sizes, whole": ({"feather_px": 5}, 61, 83),
    "smaller than a cell": ({}, 13, 90),
}


@pytest.mark.parametrize("colour_match", COLOUR_MATCHES)
@pytest.mark.parametrize(("settings", "height", "width"), CASES.values(), ids=CASES)
def test_outside_the_mask_the_picture_is_bit_for_bit_its_own(settings, height, width, colour_match):
    image, mask = picture(height, width, batch=2), square(height, width, top=2, side=8)
    prepared = prepare(image, mask, **settings)
    result = lay_back(painted_like(prepared), prepared.stitch, colour_match=colour_match)
    assert result.shape == image.shape
    reach = grow(mask, settings.get("grow_px", 0) + settings.get("feather_px", 0))[0]
    assert torch.equal(result[:, reach == 0], image[:, reach == 0])
    assert not torch.equal(result[:, mask[0] == 1], image[:, mask[0] == 1])
    assert result.min() >= 0
    assert result.max() <= 1


@pytest.mark.parametrize("mask", [torch.zeros(1, 64, 96), torch.zeros(1, 64, 64)], ids=["its size", "LoadImage's"])
@pytest.mark.parametrize("context", [None, 16])
def test_an_empty_mask_gives_the_picture_back_and_says_so(caplog, mask, context):
    with caplog.at_level(logging.WARNING):
        prepared = prepare(picture(), mask, context_px=context, feather_px=8)
    assert "The mask is empty" in caplog.text
    assert not prepared.latent_mask.any()
    assert torch.equal(lay_back(painted_like(prepared), prepared.stitch), picture())


def test_without_a_mask_all_of_it_is_painted():
    prepared = prepare(picture(), None)
    assert torch.equal(prepared.latent_mask, torch.ones(1, 1, 4, 6))
    assert torch.equal(prepared.image, picture())
    painted = painted_like(prepared)
    assert torch.equal(lay_back(painted, prepared.stitch), painted)


def test_margins_are_painted_and_the_picture_between_them_kept():
    prepared = prepare(picture(), None, padding=(16, 0, 48, 32))
    assert prepared.image.shape == (1, 96, 160, 3)
    assert torch.equal(prepared.image[:, :64, 16:112], picture())
    assert torch.equal(prepared.image[:, :64, :16], picture()[:, :, :1].expand(-1, -1, 16, -1))
    cells = torch.ones(6, 10)
    cells[:4, 1:7] = 0
    assert torch.equal(prepared.latent_mask[0, 0], cells)
    result = lay_back(painted_like(prepared), prepared.stitch)
    assert torch.equal(result[:, :64, 16:112], picture())


def test_a_mask_with_margins_paints_both():
    prepared = prepare(picture(), square(top=16, left=32, side=16), padding=(16, 0, 0, 0))
    assert prepared.latent_mask[0, 0].nonzero().tolist() == [[0, 0], [1, 0], [1, 3], [2, 0], [3, 0]]


def test_every_cell_that_the_mask_touches_is_painted():
    prepared = prepare(picture(), square(top=15, left=31, side=2))
    assert prepared.latent_mask[0, 0].nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]


def test_the_cut_holds_the_mask_and_its_context_in_whole_cells():
    prepared = prepare(picture(256, 256), square(256, 256, top=100, left=240, side=10), context_px=20)
    box = prepared.stitch.box
    assert (box.height, box.width) == (64, 48)
    assert box.top <= 80
    assert box.top + box.height >= 130
    assert (box.left, box.left + box.width) == (208, 256)
    assert torch.equal(prepared.image, picture(256, 256)[:, box.top : box.top + 64, 208:])


def test_the_cut_is_scaled_to_the_asked_size():
    mask = square(256, 512, top=100, left=100, side=60)
    mask[:, 100:160, 100:220] = 1
    prepared = prepare(picture(256, 512), mask, size_px=256, context_px=4)
    assert prepared.stitch.size == prepared.image.shape[1:3]
    height, width = prepared.stitch.size
    assert height % 16 == width % 16 == 0
    assert height * width == pytest.approx(256**2, rel=0.1)


def test_a_painted_part_goes_to_its_own_place():
    """What is laid back at its own size is what was painted, where it was cut."""
    image, mask = torch.zeros(1, 128, 128, 3), square(128, 128, top=70, left=50, side=20)
    prepared = prepare(image, mask, context_px=5)
    box = prepared.stitch.box
    painted = picture(*prepared.stitch.size)
    result = lay_back(painted, prepared.stitch, colour_match="off")
    inside = painted[:, 70 - box.top : 90 - box.top, 50 - box.left : 70 - box.left]
    assert torch.equal(result[:, 70:90, 50:70], inside)


def test_several_painted_parts_for_one_picture():
    prepared = prepare(picture(), square())
    painted = torch.cat([painted_like(prepared, seed) for seed in (1, 2, 3)])
    several = lay_back(painted, prepared.stitch)
    for i in range(3):
        assert torch.equal(several[i : i + 1], lay_back(painted[i : i + 1], prepared.stitch))


@pytest.mark.parametrize("fill", FILLS)
def test_fills_change_what_is_masked_only(fill):
    image, mask = picture(), square()
    filled = prepare(image, mask, fill=fill).image
    assert torch.equal(filled[:, mask[0] == 0], image[:, mask[0] == 0])
    assert torch.equal(filled, image) == (fill == "original")
    assert filled.min() >= 0
    assert filled.max() <= 1


def test_surroundings_hide_what_was_there():
    image, mask = torch.full((1, 64, 96, 3), 0.3), square()
    image[:, 24:26, 44:46] = 1.0
    torch.testing.assert_close(prepare(image, mask, fill="surroundings").image, torch.full_like(image, 0.3))


@pytest.mark.parametrize("how", ["smooth", "mean and spread"])
def test_a_tint_is_taken_away(how):
    image = picture() * 0.5 + 0.2
    known = 1 - square()[None]
    tinted = image.movedim(-1, 1) + torch.tensor([0.1, -0.05, 0.02])[None, :, None, None]
    torch.testing.assert_close(match_colour(tinted, image.movedim(-1, 1), known, how), image.movedim(-1, 1))


def test_contrast_is_brought_back_by_mean_and_spread():
    image, known = picture().movedim(-1, 1), 1 - square()[None]
    flat = match_colour(image * 0.5 + 0.3, image, known, "mean and spread")
    assert (flat - image).abs().max() < 0.02


def test_equal_surroundings_change_nothing():
    image, known = picture().movedim(-1, 1), 1 - square()[None]
    painted = torch.where(known == 1, image, 1 - image)
    for how in COLOUR_MATCHES:
        torch.testing.assert_close(match_colour(painted, image, known, how), painted)
    assert match_colour(painted, image, known, "off") is painted
    assert match_colour(painted, image, torch.zeros_like(known), "smooth") is painted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": square(32, 32, top=2, left=2)}, r"a mask of the picture's size, 96 x 64, expected, got 32 x 32"),
        ({"mask": square().repeat(3, 1, 1)}, r"one mask, or one for each of 1 pictures, expected, got 3"),
        ({"mask": square() * float("nan")}, r"a mask of finite numbers"),
        ({"image": picture() * float("inf")}, r"a picture of finite numbers"),
        ({"image": picture()[..., :1]}, r"pictures \[batch, height, width, 3\] expected, got \[1, 64, 96, 1\]"),
        ({"padding": (0, -8, 0, 0)}, r"0 or more pixels expected"),
        ({"feather_px": -1}, r"0 or more pixels expected"),
        ({"fill": "pink"}, r"fill original or surroundings or grey or noise expected, got 'pink'"),
        ({"size_px": 9000, "context_px": 0}, r"a part of at most 8192 pixels a side expected"),
    ],
)
def test_what_cannot_be_prepared_says_so(change, message):
    settings = {"image": picture(), "mask": square()} | change
    with pytest.raises(ErnieError, match=message):
        prepare(**settings)


def test_what_cannot_be_laid_back_says_so():
    prepared = prepare(picture(), square())
    with pytest.raises(ErnieError, match=r"a picture of 96 x 64, as Inpaint Prepare made it, expected, got 32 x 32"):
        lay_back(picture(32, 32), prepared.stitch)
    with pytest.raises(ErnieError, match=r"a picture of finite numbers"):
        lay_back(prepared.image * float("nan"), prepared.stitch)
    with pytest.raises(ErnieError, match=r"colour_match smooth or mean and spread or off expected, got 'red'"):
        lay_back(prepared.image, prepared.stitch, colour_match="red")
