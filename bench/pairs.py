"""Our networks and their diffusers counterparts on one set of random weights, held once in memory.

Peers are cast by `nn.Module.to`: diffusers' own `to` warns about fp32 modules, of which these networks have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ernie_core.config import DiTConfig, VAEConfig
from ..ernie_core.model.dit import DiT
from ..ernie_core.model.vae import VAE


def randomise(module: nn.Module, *, seed: int = 0) -> None:
    """Fill `module` so that activations keep unit size: gains near 1, matrices 1/sqrt(fan-in), small biases.

    No gate, scale or bias is left at zero, so a missing term shows.
    """
    tensors = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if b.is_floating_point())]
    device = tensors[0][1].device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tensors:
            if tensor.ndim > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 3.0, generator=generator)
            else:
                tensor.normal_(mean=float(name.endswith("weight")), std=0.1, generator=generator)


def make_dit_pair(
    config: DiTConfig, *, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[DiT, Any]:
    """(DiT, ErnieImageTransformer2DModel) that share every weight tensor."""
    from diffusers import ErnieImageTransformer2DModel

    with torch.device("meta"):
        peer = ErnieImageTransformer2DModel(**config.to_dict())
    peer = nn.Module.to(peer, dtype).to_empty(device=device).eval().requires_grad_(False)
    randomise(peer, seed=seed)
    ours = DiT(config, dtype=dtype, device="meta").eval().requires_grad_(False)
    ours.load_state_dict(peer.state_dict(), assign=True)
    return ours, peer


def make_vae_pair(
    config: VAEConfig, *, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[VAE, Any]:
    """(VAE in channels_last, AutoencoderKLFlux2 as diffusers builds it), equal weights."""
    from diffusers import AutoencoderKLFlux2

    levels = len(config.block_out_channels)
    # With the statistics' trained eps; the released file's 1e-4 is never used by the official pipeline.
    with torch.device("meta"):
        peer = AutoencoderKLFlux2(
            **config.to_dict(),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )
    peer = nn.Module.to(peer, dtype).to_empty(device=device).eval().requires_grad_(False)
    randomise(peer, seed=seed)
    peer.bn.num_batches_tracked.zero_()
    ours = VAE(config, dtype=dtype, device=device).eval().requires_grad_(False)
    ours.load_state_dict(peer.state_dict())
    return ours.to(memory_format=torch.channels_last), peer
