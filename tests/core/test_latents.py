"""Packing, noise and mixing: inverse pairs and the host's seed rule."""

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
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
