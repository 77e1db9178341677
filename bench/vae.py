"""Decoding on the CPU: our channels_last against diffusers' default layout, full-size autoencoder."""

from __future__ import annotations

import torch

from ..ernie_core.config import SIZE_MULTIPLE, VAEConfig
from ..ernie_core.sampling.latents import unpatchify
from .compare import Row, compare, cpu_dtype
from .pairs import make_vae_pair


def diffusers_decode(model, latent):
    """From the normalised latent, as the official pipeline does it."""
    mean = model.bn.running_mean.view(1, -1, 1, 1).to(latent.dtype)
    std = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + 1e-5).to(latent.dtype)
    return model.decode(unpatchify(latent * std + mean), return_dict=False)[0]


def measure() -> list[Row]:
    dtype, words = cpu_dtype()
    side_px = 256 if dtype == torch.bfloat16 else 128
    config = VAEConfig()
    ours, peer = make_vae_pair(config, dtype=dtype)
    side = side_px // SIZE_MULTIPLE
    latent = torch.randn(1, config.packed_channels, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    return [
        compare(
            f"VAE decode, {side_px} px ({words})",
            ours=lambda: ours.decode(latent),
            peer=lambda: diffusers_decode(peer, latent),
            peer_name="diffusers",
            at_least=2.0,
        )
    ]
