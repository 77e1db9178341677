"""Mask laws: growing, soft edges, latent cells, holding the outside, continuing what is known."""

import pytest
import torch
from ernie_pack.ernie_core.sampling.masks import fit_mask, grow, hold_outside, soften, spread, to_latent_mask, to_pixels
from ernie_pack.ernie_core.sampling.samplers import sample_euler
from ernie_pack.ernie_core.sampling.schedule import make_sigmas


def dot(side=33, at=16):
    mask = torch.zeros(1, side, side)
    mask[:, at, at] = 1
    return mask


def test_growing_reaches_as_far_as_asked():
    found = grow(dot(), 3)[0].nonzero()
    assert found.amin(0).tolist() == [13, 13]
    assert found.amax(0).tolist() == [19, 19]
    assert len(found) == 49
    assert torch.equal(grow(dot(), 0), dot())


def test_growing_twice_is_growing_by_the_sum():
    mask = (torch.rand(2, 20, 30, generator=torch.Generator().manual_seed(0)) > 0.97).float()
    assert torch.equal(grow(grow(mask, 2), 3), grow(mask, 5))


@pytest.mark.parametrize("px", [2, 8, 9])
def test_a_soft_edge_is_a_falling_slope_outside_that_ends(px):
    mask = torch.zeros(1, 40, 40)
    mask[:, :, :20] = 1
    row = soften(mask, px)[0, 20]
    assert torch.equal(row[:20], torch.ones(20))
    assert torch.equal(row[20 + px :], torch.zeros(20 - px))
    slope = row[19 : 20 + px // 2 * 2]
    assert (slope.diff() < 0).all()
    torch.testing.assert_close(slope.diff(), slope.diff()[:1].expand(len(slope) - 1))


def test_no_feather_and_flat_masks_stay():
    assert torch.equal(soften(dot(), 1), dot())
    for flat in (torch.zeros(1, 32, 32), torch.ones(1, 32, 32)):
        assert torch.equal(soften(flat, 8), flat)


def test_every_touched_cell_is_painted_and_no_other():
    mask = torch.zeros(1, 48, 48)
    mask[:, 15:17, 20] = 1  # touches the first and the second row of cells, in the second column
    cells = to_latent_mask(mask, mask)
    assert cells.shape == (1, 1, 3, 3)
    assert cells[0, 0].nonzero().tolist() == [[0, 1], [1, 1]]
    assert set(cells.unique().tolist()) == {0, 1}
    assert (to_pixels(cells) >= mask).all()


def test_soft_cells_hold_their_share():
    soft = torch.zeros(1, 16, 32)
    soft[:, :, 16:20] = 0.5
    assert to_latent_mask(torch.zeros(1, 16, 32), soft).flatten().tolist() == [0, 0.125]


def test_a_mask_of_the_latents_size_comes_out_as_it_is():
    mask = torch.rand(1, 1, 5, 7)
    assert torch.equal(fit_mask(mask, torch.zeros(3, 4, 5, 7)), mask.expand(3, -1, -1, -1))


def test_masks_repeat_over_the_batch():
    masks = torch.stack([torch.zeros(32, 32), torch.ones(32, 32)])
    assert fit_mask(masks, torch.zeros(3, 4, 2, 2))[:, 0, 0, 0].tolist() == [0, 1, 0]


def oracle(x, sigma):
    """The velocity of a picture of ones: x0 is 1 wherever x lies."""
    return (x - 1) / sigma


def paint(mask, steps=6):
    generator = torch.Generator().manual_seed(0)
    start, noise = (torch.randn(1, 4, 3, 3, generator=generator) for _ in range(2))
    denoise = hold_outside(oracle, mask, start, noise)
    return sample_euler(denoise, noise.clone(), make_sigmas(steps)), start, noise


def test_zeros_give_the_start_picture():
    painted, start, _ = paint(torch.zeros(1, 1, 3, 3))
    torch.testing.assert_close(painted, start, rtol=0, atol=1e-5)


def test_ones_are_the_plain_denoiser():
    assert hold_outside(oracle, torch.ones(1, 1, 3, 3), torch.zeros(1), torch.zeros(1)) is oracle


def test_inside_is_painted_and_outside_kept():
    mask = torch.zeros(1, 1, 3, 3)
    mask[..., 1, 1] = 1
    painted, start, _ = paint(mask)
    torch.testing.assert_close(painted * (1 - mask), start * (1 - mask), rtol=0, atol=1e-5)
    torch.testing.assert_close(painted[..., 1, 1], torch.ones(1, 4), rtol=0, atol=1e-5)


def test_the_model_sees_the_outside_on_its_noisy_path():
    """Written out, at one noise level: what is asked, and what is answered, for a mask of a quarter."""
    seen = []

    def denoise(x, sigma):
        seen.append(x)
        return oracle(x, sigma)

    generator = torch.Generator().manual_seed(1)
    x, start, noise = (torch.randn(1, 4, 3, 3, generator=generator) for _ in range(3))
    velocity = hold_outside(denoise, torch.full((1, 1, 3, 3), 0.25), start, noise)(x, 0.6)
    torch.testing.assert_close(seen[0], 0.25 * x + 0.75 * (0.6 * noise + 0.4 * start))
    torch.testing.assert_close(x - 0.6 * velocity, 0.25 + 0.75 * start)


def test_what_is_known_stays_and_a_flat_field_is_continued():
    known = torch.ones(1, 1, 37, 21)
    known[..., 5:30, 4:17] = 0
    values = torch.randn(2, 3, 37, 21)
    assert torch.equal(spread(values, known)[:, :, :5], values[:, :, :5])
    torch.testing.assert_close(spread(torch.full_like(values, 0.3), known), torch.full_like(values, 0.3))


def test_a_hole_is_filled_from_its_sides_without_jumps():
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    known = torch.ones(1, 1, 64, 64)
    known[..., 16:48, 16:48] = 0
    filled = spread(ramp, known)
    assert (filled - ramp).abs().max() < 0.25
    assert filled.diff(dim=-1).abs().max() < 0.1
    assert filled.min() >= 0
    assert filled.max() <= 1


def test_nothing_known_is_zeros():
    assert torch.equal(spread(torch.randn(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)), torch.zeros(1, 3, 8, 8))
