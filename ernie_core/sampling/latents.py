"""Latents: 2x2 packing, size, noise, mixing.

Conventions: a packed latent is [B, 4c, H/16, W/16] with channel = 4 c + 2 row + column ("c pi pj" in diffusers, BFL and
ComfyUI alike). Noise is drawn on the CPU in fp32, so that one seed is one picture on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..config import SIZE_MULTIPLE, check_size
from ..errors import ErnieError


def patchify(vae_latent_BCHW: Tensor) -> Tensor:
    """[B, c, 2h, 2w] -> [B, 4c, h, w]."""
    return rearrange(vae_latent_BCHW, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)


def unpatchify(packed_BCHW: Tensor) -> Tensor:
    """[B, 4c, h, w] -> [B, c, 2h, 2w]; the inverse of `patchify`."""
    return rearrange(packed_BCHW, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)


RESIZE_METHODS = ("bicubic", "bilinear", "nearest-exact")


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Both sides of a latent times `scale`, rounded to whole cells, at least 1; ErnieError unless 0 < scale <= 16."""
    if not 0 < scale <= 16:
        raise ErnieError(f"scale must be above 0 (1 = the same size) and at most 16, got {scale:g}.")
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize_latent(packed_BCHW: Tensor, height: int, width: int, method: str = "bicubic") -> Tensor:
    """[B, 4c, h, w] -> [B, 4c, height, width], what it shows staying in its place; the same tensor at its own size.

    Resized is the latent behind the packing: in the packed one the four sub-pixels of a cell are channels, and each
    would be spread over the whole cell, up to a quarter of a cell off its place. Their normalisation is taken as equal.

    Raises:
        ErnieError: a side below 1, or no such method.
    """
    if method not in RESIZE_METHODS:
        raise ErnieError(f"method must be one of {', '.join(RESIZE_METHODS)}, got {method!r}.")
    if min(height, width) < 1:
        raise ErnieError(f"a latent of at least 1 x 1 expected, got {height} x {width}: choose a larger scale.")
    if packed_BCHW.shape[2:] == (height, width):
        return packed_BCHW
    smooth = {} if method == "nearest-exact" else {"antialias": True, "align_corners": False}
    size = (2 * height, 2 * width)
    return patchify(F.interpolate(unpatchify(packed_BCHW.float()), size=size, mode=method, **smooth)).to(packed_BCHW)


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
