"""Latents: 2x2 packing, noise, mixing.

Conventions: a packed latent is [B, 4c, H/16, W/16] with channel = 4 c + 2 row + column ("c pi pj" in diffusers, BFL and
ComfyUI alike). Noise is drawn on the CPU in fp32, so that one seed is one picture on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from ..config import SIZE_MULTIPLE, check_size


def patchify(vae_latent_BCHW: Tensor) -> Tensor:
    """[B, c, 2h, 2w] -> [B, 4c, h, w]."""
    return rearrange(vae_latent_BCHW, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)


def unpatchify(packed_BCHW: Tensor) -> Tensor:
    """[B, 4c, h, w] -> [B, c, 2h, 2w]; the inverse of `patchify`."""
    return rearrange(packed_BCHW, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)


def latent_size(width: int, height: int) -> tuple[int, int]:
    """(rows, columns) of the latent of a picture; ErnieError unless both sides are multiples of 16."""
    check_size(width, height)
    return height // SIZE_MULTIPLE, width // SIZE_MULTIPLE


def make_noise(seeds: Sequence[int], channels: int, height_lat: int, width_lat: int) -> Tensor:
    """Standard normal [len(seeds), channels, height_lat, width_lat], CPU fp32, one generator per picture.

    Picture i depends on seeds[i] alone: a batch of seeds equals the pictures made one by one, and each equals what the
    host draws for that seed at batch size 1.
    """
    return torch.cat(
        [
            torch.randn(1, channels, height_lat, width_lat, generator=torch.Generator("cpu").manual_seed(seed))
            for seed in seeds
        ]
    )


def step_noise(pictures: Sequence[tuple[int, int]]) -> Callable[[Tensor], Tensor]:
    """draw(x_BCHW) -> fresh standard normal like x, drawn on the CPU in fp32; each call gives the next.

    `pictures` names each picture of the batch by (seed, place in the batch it is drawn with): its noise depends on
    these two and on nothing else of the batch, and is another than the noise that sampling starts from.
    """
    generators = [torch.Generator("cpu").manual_seed(_derived_seed(*picture)) for picture in pictures]

    def draw(x_BCHW: Tensor) -> Tensor:
        shape = (1, *x_BCHW.shape[1:])
        return torch.cat([torch.randn(shape, generator=g) for g in generators]).to(x_BCHW)

    return draw


def _derived_seed(seed: int, place: int) -> int:
    digest = hashlib.sha256(f"step noise {seed} {place}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def mix_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise, the rectified-flow path; sigma broadcasts."""
    return (1 - sigma) * x0 + sigma * noise
