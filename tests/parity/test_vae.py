"""The autoencoder against diffusers' AutoencoderKLFlux2; fp32, the same random weights."""

import pytest
import torch
from ernie_pack.bench.pairs import make_vae_pair
from ernie_pack.ernie_core.config import VAEConfig
from ernie_pack.ernie_core.model.vae import VAE
from ernie_pack.ernie_core.sampling.latents import patchify, unpatchify

pytestmark = pytest.mark.parity

CONFIGS = {
    "small": VAEConfig(latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4),
    "other decoder": VAEConfig(
        latent_channels=4,
        block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=(16, 16, 32, 64),
        norm_num_groups=8,
    ),
    "released": VAEConfig(),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    return make_vae_pair(CONFIGS[request.param], dtype=torch.float32)


@pytest.fixture
def picture():
    return torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def statistics(theirs):
    """As the official pipeline reads them: with eps 1e-5, whatever the file's config says."""
    bn = theirs.bn
    return bn.running_mean[:, None, None], torch.sqrt(bn.running_var[:, None, None] + 1e-5)


@torch.no_grad()
def test_encoding_is_diffusers(pair, picture):
    from diffusers import ErnieImagePipeline

    ours, theirs = pair
    mean, std = statistics(theirs)
    posterior = theirs.encode(picture).latent_dist
    expected = (ErnieImagePipeline._patchify_latents(posterior.mode()) - mean) / std
    assert expected.std() > 0.1
    assert float((ours.encode(picture) - expected).abs().max()) <= 1e-4
    assert float((ours.posterior(picture)[1] - posterior.parameters.chunk(2, dim=1)[1]).abs().max()) <= 1e-4


@torch.no_grad()
def test_decoding_is_diffusers(pair):
    from diffusers import ErnieImagePipeline

    ours, theirs = pair
    mean, std = statistics(theirs)
    latent = torch.randn(2, ours.config.packed_channels, 3, 2, generator=torch.Generator().manual_seed(0))
    expected = theirs.decode(ErnieImagePipeline._unpatchify_latents(latent * std + mean)).sample
    assert expected.std() > 0.1
    assert float((ours.decode(latent) - expected).abs().max()) <= 1e-4


def test_packing_is_diffusers():
    from diffusers import ErnieImagePipeline

    x = torch.randn(2, 32, 6, 4)
    packed = ErnieImagePipeline._patchify_latents(x)
    assert torch.equal(patchify(x), packed)
    assert torch.equal(unpatchify(packed), ErnieImagePipeline._unpatchify_latents(packed))


def test_names_and_shapes_are_diffusers():
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        theirs = AutoencoderKLFlux2().state_dict()
    ours = VAE(VAEConfig(), device="meta").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
