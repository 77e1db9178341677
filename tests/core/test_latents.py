"""Packing, noise and mixing: inverse pairs and the host's seed rule."""

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling import latents
from ernie_pack.ernie_core.sampling.latents import latent_size, make_noise, mix_noise, patchify, unpatchify


def test_packing_puts_row_before_column_within_each_channel():
    x = torch.zeros(1, 3, 4, 6)
    x[0, 2, 2 * 1 + 1, 2 * 2 + 0] = 1  # channel 2, cell (1, 2), second row, first column of the cell
    packed = patchify(x)
    assert packed.shape == (1, 12, 2, 3)
    assert packed.nonzero().tolist() == [[0, 4 * 2 + 2 * 1 + 0, 1, 2]]


def test_unpacking_undoes_packing():
    x = torch.randn(2, 5, 4, 6)
    assert torch.equal(unpatchify(patchify(x)), x)
    y = torch.randn(2, 8, 3, 5)
    assert torch.equal(patchify(unpatchify(y)), y)


def test_size_is_rows_then_columns():
    assert latent_size(1264, 848) == (53, 79)
    with pytest.raises(ErnieError, match="width must be a multiple of 16, got 1000"):
        latent_size(1000, 848)


def test_a_batch_of_seeds_is_the_pictures_one_by_one():
    seeds = [7, 0, 2**64 - 1, 7]
    batch = make_noise(seeds, 8, 3, 5)
    assert batch.dtype == torch.float32
    assert batch.device.type == "cpu"
    assert torch.equal(batch, torch.cat([make_noise([s], 8, 3, 5) for s in seeds]))


def test_noise_is_the_hosts_for_one_picture():
    """comfy.sample.prepare_noise: torch.manual_seed, then one fp32 draw of the latent's shape on the CPU."""
    with torch.random.fork_rng(devices=[]):
        host = torch.randn((1, 128, 4, 6), generator=torch.manual_seed(1234), dtype=torch.float32, device="cpu")
    assert torch.equal(make_noise([1234], 128, 4, 6), host)


def test_drawing_noise_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    make_noise([1], 4, 2, 2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_mixing_has_the_picture_at_0_the_noise_at_1_and_a_constant_velocity_between():
    x0, noise = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    assert torch.equal(mix_noise(x0, noise, 0.0), x0)
    assert torch.equal(mix_noise(x0, noise, 1.0), noise)
    for sigma in (0.1, 0.5, 0.9):
        x = mix_noise(x0, noise, sigma)
        velocity = noise - x0
        torch.testing.assert_close(x - sigma * velocity, x0)
        torch.testing.assert_close(x + (1 - sigma) * velocity, noise)


def test_each_picture_may_have_its_own_sigma():
    x0, noise = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    sigma = torch.tensor([0.25, 0.75])[:, None, None, None]
    assert mix_noise(x0, noise, sigma).flatten().tolist() == [0.25, 0.75]


def picture_of(field, height, width):
    """The packed latent [1, 4, height, width] whose sub-pixels sample field(y, x), y and x in 0 to 1."""
    y = (torch.arange(2 * height) + 0.5) / (2 * height)
    x = (torch.arange(2 * width) + 0.5) / (2 * width)
    return latents.patchify(field(y[:, None], x[None, :])[None, None])


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_a_resized_latent_stays_in_its_place(method):
    def ramp(y, x):
        return 3 * y - 2 * x

    out = latents.resize_latent(picture_of(ramp, 8, 12), 16, 24, method)
    expected = picture_of(ramp, 16, 24)
    inside = (..., slice(3, -3), slice(3, -3))  # at the edges every method makes things up
    assert (out - expected)[inside].abs().max() < 1e-5
    # What resizing the packed channels makes of it: every sub-pixel off its place.
    packed = torch.nn.functional.interpolate(picture_of(ramp, 8, 12), size=(16, 24), mode=method, align_corners=False)
    assert (packed - expected)[inside].abs().max() > 0.03


@pytest.mark.parametrize("method", latents.RESIZE_METHODS)
def test_resizing_keeps_what_needs_no_change(method):
    x = torch.randn(2, 128, 5, 3, generator=torch.Generator().manual_seed(3))
    assert latents.resize_latent(x, 5, 3, method) is x
    for size in ((10, 6), (3, 2)):
        flat = latents.resize_latent(torch.full_like(x, 0.5), *size, method)
        assert flat.shape == (2, 128, *size)
        assert (flat - 0.5).abs().max() < 1e-6


def test_nearest_repeats_sub_pixels():
    x = torch.randn(1, 128, 3, 4, generator=torch.Generator().manual_seed(4))
    out = latents.unpatchify(latents.resize_latent(x, 6, 8, "nearest-exact"))
    assert torch.equal(out, latents.unpatchify(x).repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_sizes_and_methods_that_do_not_exist_are_refused():
    x = torch.zeros(1, 128, 3, 4)
    with pytest.raises(ErnieError, match="method must be one of bicubic, bilinear, nearest-exact, got 'area'"):
        latents.resize_latent(x, 6, 8, "area")
    with pytest.raises(ErnieError, match="a latent of at least 1 x 1 expected, got 0 x 8"):
        latents.resize_latent(x, 0, 8)
    assert latents.scaled_size(9, 5, 1.5) == (14, 8)
    assert latents.scaled_size(3, 3, 0.1) == (1, 1)
    for scale in (0.0, -1.0, 17.0, float("nan")):
        with pytest.raises(ErnieError, match="scale must be above 0"):
            latents.scaled_size(4, 4, scale)
